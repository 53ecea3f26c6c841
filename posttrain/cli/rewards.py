"""Defines the commands about rewards: ``posttrain rewards``, ``score`` and ``serve-reward``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, DeviceOption, number, terminal

rewards_app = typer.Typer(
    help="List the rewards and their requirements, or download their weights.", no_args_is_help=False
)
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A=B",
        help="Set a field of the reward; with several rewards, NAME.FIELD=VALUE. Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(rewards_app, name="rewards")
    app.command("score")(score)
    app.command("serve-reward")(serve_reward)


@rewards_app.callback(invoke_without_command=True)
def rewards_list(context: typer.Context) -> None:
    """List the rewards with range, weights, licence, and whether they can run on this machine."""
    if context.invoked_subcommand is not None:
        return
    from posttrain.scoring.catalogue import listing

    terminal().print(listing(), soft_wrap=True)


@rewards_app.command("fetch")
def rewards_fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A reward's name, as 'posttrain rewards' lists it.")
    ],
    debug: DebugOption = False,
) -> None:
    """Download a reward's weights into the hub's cache and check their hashes.

    The same command resumes an interrupted download.
    """
    del debug
    from posttrain.scoring.catalogue import fetch

    for source, path in fetch(name):
        terminal().print(
            f"{source.repo} ({source.weights.licence}): complete and as published, in {path}",
            soft_wrap=True,
        )


def score(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGES...", help="Image files, or folders of images.")
    ] = None,
    reward: Annotated[list[str] | None, typer.Option(help="A reward to score with. Repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file with one prompt an image, or GenEval-format JSONL with an 'image' field."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all images.")] = None,
    overrides: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The JSONL file to write the scores to.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65_536, help="Images that are scored at once.")] = 16,
    conformance: Annotated[
        bool,
        typer.Option("--conformance", help="Score fixed images, to compare machines; writes JSON."),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="With --conformance: compare with this file and fail if scores differ."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, callback=number, help="With --against: largest difference, relative for scores above 1."
        ),
    ] = 1e-5,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Score images on disk and print the means with intervals.

    With --output, also write one line for each image.
    """
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import chosen_rewards
    from posttrain.support.device import resolve, set_tf32

    if conformance and (images or prompts or prompt is not None):
        raise PosttrainError("--conformance has images and prompts of its own: give none")
    if against is not None and not conformance:
        raise PosttrainError("--against compares conformance files: give --conformance too")
    rewards = chosen_rewards(reward or (), overrides or ())
    set_tf32(False)
    if conformance:
        return _conform(rewards, resolve(device), output, against, tolerance)
    from posttrain.evaluation.card import result
    from posttrain.evaluation.report.table import card_table
    from posttrain.scoring.folder import image_files, score_files, with_prompts
    from posttrain.support.files import check_writable, write
    from posttrain.support.wording import counted

    if not images:
        raise PosttrainError("say which images to score: files or folders")
    items = with_prompts(image_files(images), prompts, prompt, rewards)
    if output is not None:
        check_writable(output)
    records = score_files(items, rewards, resolve(device), batch_size)
    if output is not None:
        write(output, "".join(json.dumps(record) + "\n" for record in records))
    terminal().print(card_table(counted(len(records), "image"), result(records, rewards)))
    return None


def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward's name, or module:function.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on. Other machines reach any but loopback.")
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None,
        typer.Option(metavar="VAR", help="The environment variable that holds the clients' token."),
    ] = None,
    max_mb: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Largest request in MB (1000000 bytes).")
    ] = 256,
    max_connections: Annotated[
        int, typer.Option(min=1, max=65_536, help="Connections at a time. Beyond it, idle ones are closed.")
    ] = 512,
    transfer_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=86_400,
            callback=number,
            help="Within this time a request must arrive, and its answer be taken.",
        ),
    ] = 60.0,
    reward_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=86_400,
            callback=number,
            help="A reward that takes longer for a batch is ended and started again, once.",
        ),
    ] = 600.0,
    batch_size: Annotated[
        int, typer.Option(min=1, max=65_536, help="Images of waiting requests that are scored together.")
    ] = 64,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Serve a reward over HTTP, for recipes that use a reward of type remote."""
    del debug
    from contextlib import closing
    from importlib.util import find_spec

    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import chosen_rewards
    from posttrain.support.device import resolve

    if missing := [package for package in ("fastapi", "uvicorn") if find_spec(package) is None]:
        raise PosttrainError(f"serve-reward needs {', '.join(missing)}: pip install 'posttrain[rewards]'")
    from posttrain.scoring.server.app import application
    from posttrain.scoring.server.batching import Batcher
    from posttrain.scoring.server.limits import Limits
    from posttrain.scoring.server.listen import check_exposure, serve
    from posttrain.scoring.server.worker import Worker
    from posttrain.support.tokens import token_in, token_problem

    if token_env is not None and (reason := token_problem(token_env)) is not None:
        raise PosttrainError(f"--token-env: {reason}")
    token = None if token_env is None else token_in(token_env)
    check_exposure(host, token)
    (reward,) = chosen_rewards([name], overrides or ())
    limits = Limits(max_mb * 1_000_000, max_connections, transfer_seconds)
    try:
        with closing(Worker(reward, resolve(device), reward_seconds)) as worker:
            worker.start()
            app = application(reward, Batcher(worker, batch_size), limits, token)
            serve(app, host, port, limits, lambda url: typer.echo(f"{reward.label}: {url}"))
    except KeyboardInterrupt:
        typer.echo("stopped")


def _conform(rewards, device, output: Path | None, against: Path | None, tolerance: float) -> None:
    """Score the fixed images of the conformance test, write the scores, and compare them with ``against``."""
    from posttrain.errors import PosttrainError, RewardError
    from posttrain.scoring.conformance import conformance, differences, read
    from posttrain.support.files import write

    if len(rewards) != 1:
        raise PosttrainError(f"--conformance takes one reward at a time, not {len(rewards)}")
    expected = None if against is None else read(against)
    scored = conformance(rewards[0], device)
    text = json.dumps(scored, indent=1) + "\n"
    if output is not None:
        write(output, text)
    elif expected is None:
        typer.echo(text, nl=False)
    if expected is not None:
        if problems := differences(scored, expected, tolerance):
            raise RewardError(f"{scored['reward']} differs from {against}:\n  " + "\n  ".join(problems))
        terminal().print(
            f"{scored['reward']}: {len(scored['cases'])} scores as in {against}, to {tolerance:g}",
            soft_wrap=True,
        )
