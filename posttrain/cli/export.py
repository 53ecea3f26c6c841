"""Defines ``posttrain export``, which writes a stage's weights in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from posttrain.cli.options import DebugOption, terminal


def export_stage(
    run: Annotated[
        str, typer.Argument(metavar="RUN[/STAGE]", help="A run's folder (its last stage) or a stage's.")
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="diffusers or comfyui for a fully tuned stage; lora, merged, comfyui or kohya for a LoRA. "
            "Default: diffusers, or lora."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: that of the stage's final/.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload it to this new hub repository.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see the hub repository. Default: you alone.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Write what a stage trained in the format of another tool, with its model card.

    The weights are those that were trained, whatever precision final/ has.
    """
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.model import DtypeName
    from posttrain.stages.export import Format, export, trained_at
    from posttrain.stages.hub import push

    for option, value, allowed in (("--format", format, Format), ("--dtype", dtype, DtypeName)):
        if value is not None and value not in get_args(allowed):
            raise PosttrainError(f"{option}: {value!r} is none of {', '.join(get_args(allowed))}")
    if public and push_to_hub is None:
        raise PosttrainError("--public is for --push-to-hub, and without it has no effect")
    console, trained = terminal(), trained_at(run)
    written = export(trained, to, format, dtype, overwrite=overwrite)  # type: ignore[arg-type]
    # a folder of diffusers is loaded whole; the other formats are one file, which its user copies
    place = next(iter(to.glob("*.safetensors")), to)
    console.print(f"wrote {trained.final.parent} as {written} to {place}", soft_wrap=True, markup=False)
    if push_to_hub is not None:
        address = push(to, push_to_hub, private=not public, overwrite=overwrite)
        console.print(f"uploaded to {address}", soft_wrap=True, markup=False)
