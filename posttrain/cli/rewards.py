"""The commands about rewards: ``posttrain rewards | score | serve-reward``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, DeviceOption, terminal

rewards_app = typer.Typer(
    help="List the rewards with what they need, or fetch their weights.", no_args_is_help=False
)
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A=B",
        help="A field of the reward, or NAME.FIELD=VALUE of one of several. Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(rewards_app, name="rewards")
    app.command("score")(score)
    app.command("serve-reward")(serve_reward)


@rewards_app.callback(invoke_without_command=True)
def rewards_list(context: typer.Context) -> None:
    """List the rewards: range, weights, licence, and whether all that they need is here."""
    if context.invoked_subcommand is not None:
        return
    from posttrain.scoring.catalogue import listing

    terminal().print(listing(), soft_wrap=True, highlight=False)


@rewards_app.command("fetch")
def rewards_fetch(
    name: Annotated[str, typer.Argument(help="A reward's name, as 'posttrain rewards' lists it.")],
    debug: DebugOption = False,
) -> None:
    """Download a reward's weights into the hub's cache, going on after a cut, and check their hashes."""
    del debug
    from posttrain.scoring.catalogue import fetch

    for source, path in fetch(name):
        terminal().print(
            f"{source.repo} ({source.weights.licence}): complete and as published, in {path}",
            highlight=False,
            soft_wrap=True,
        )


def score(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")
    ] = None,
    reward: Annotated[list[str] | None, typer.Option(help="What to score with. Repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file, one prompt an image; or GenEval-format JSONL, 'image' names the file."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt of all images.")] = None,
    overrides: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the scores: JSONL.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    conformance: Annotated[
        bool,
        typer.Option("--conformance", help="Score fixed images instead, to compare machines; writes JSON."),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="With --conformance: compare with this file; differences are an error."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="With --against: how far scores may be apart (of 1, or of their size)."),
    ] = 1e-5,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Score images on disk: means with intervals, and with --output a line for each image."""
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

    if not images:
        raise PosttrainError("say which images to score: files, or folders of them")
    items = with_prompts(image_files(images), prompts, prompt, rewards)
    records = score_files(items, rewards, resolve(device), batch_size)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(record) + "\n" for record in records))
    terminal().print(card_table(f"{len(records)} images", result(records, rewards)))
    return None


def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward's name, or module:function.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; others can reach all but loopback.")
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="The environment variable with the token to ask for.")
    ] = None,
    max_mb: Annotated[int, typer.Option(min=1, help="The largest request, in units of 1000000 bytes.")] = 256,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images of waiting requests to score together.")
    ] = 64,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Serve a reward over HTTP, for recipes with 'type: remote'."""
    del debug
    import os
    from importlib.util import find_spec

    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import chosen_rewards
    from posttrain.support.device import resolve, set_tf32

    if missing := [package for package in ("fastapi", "uvicorn") if find_spec(package) is None]:
        raise PosttrainError(f"serve-reward needs {', '.join(missing)}: pip install 'posttrain[rewards]'")
    from posttrain.scoring.server.app import application, check_exposure, serve

    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise PosttrainError(f"--token-env: there is no environment variable {token_env!r}, or it is empty")
    check_exposure(host, token)
    (reward,) = chosen_rewards([name], overrides or ())
    set_tf32(False)
    app = application(
        reward, resolve(device), token=token, max_bytes=max_mb * 1_000_000, batch_size=batch_size
    )
    try:
        serve(app, host, port, lambda url: typer.echo(f"{reward.label}: {url}"))
    except KeyboardInterrupt:
        typer.echo("stopped")


def _conform(rewards, device, output: Path | None, against: Path | None, tolerance: float) -> None:
    from posttrain.errors import PosttrainError, RewardError
    from posttrain.scoring.conformance import conformance, differences, read

    if len(rewards) != 1:
        raise PosttrainError("--conformance is of one reward at a time")
    there = None if against is None else read(against)
    here = conformance(rewards[0], device)
    text = json.dumps(here, indent=1) + "\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    elif there is None:
        typer.echo(text, nl=False)
    if there is not None:
        if found := differences(here, there, tolerance):
            raise RewardError(f"{here['reward']} differs from {against}:\n  " + "\n  ".join(found))
        terminal().print(
            f"{here['reward']}: {len(here['cases'])} scores as in {against}, to {tolerance:g}",
            highlight=False,
            soft_wrap=True,
        )
