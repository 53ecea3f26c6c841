"""Defines ``posttrain --version``."""

from __future__ import annotations

from typing import Annotated

import typer

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def _show(wanted: bool) -> None:
    if not wanted:
        return
    from posttrain import __version__
    from posttrain.support.versions import versions

    others = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items())
    typer.echo(f"posttrain {__version__} ({others})")
    raise typer.Exit


def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show,
            is_eager=True,
            help="Print the versions of posttrain and its libraries.",
        ),
    ] = False,
) -> None:
    """Post-train rectified-flow text-to-image models by SFT, SOAR, DPO, Flow-GRPO, DiffusionNFT, or
    chains of these."""
    del version  # the callback has printed it
