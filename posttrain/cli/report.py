"""Defines ``posttrain report``, which writes the report of a run again, or one that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, terminal


def write_reports(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN...]", help="Folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page. Default: report.html in the run's folder; of several runs, beside the first."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write the report of a run, finished or not; of several runs one report that compares them."""
    del debug
    from posttrain.evaluation.report.page import write_report

    page = write_report(*runs, output=output)
    terminal().print(f"report: {page}", soft_wrap=True)
