"""Runs a recipe shrunk (``posttrain run --smoke``): says what differs, and keeps to a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.options import terminal


def run_shrunk(
    source: str, overrides: Sequence[str], output: Path | None, nproc: int, fresh: Sequence[str]
) -> None:
    """Run the recipe ``source`` shrunk, anew. Raises PosttrainError."""
    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import load_recipe
    from posttrain.recipe.smoke import SUFFIX, smoke, smoke_name
    from posttrain.stages.chain import run
    from posttrain.support.files import write
    from posttrain.support.paths import is_file
    from posttrain.support.records import read_object
    from posttrain.support.terminal import note

    if nproc > 1:
        raise PosttrainError("--smoke runs one process: leave --nproc out")
    if fresh:
        raise PosttrainError("--smoke begins all anew: leave --fresh out")
    recipe, console = load_recipe(source, overrides, checks=False), terminal()
    folder = output or Path("runs") / smoke_name(recipe.name)
    before = folder / "run.json"
    known = before.is_file()
    if known and not str(read_object(before).get("name")).endswith(SUFFIX):
        raise PosttrainError(f"--smoke would remove the run in {str(folder)!r}: give another --output")
    small = smoke(recipe, folder)
    for file, text in small.files.items():
        if not known and is_file(file) and file.read_bytes() != text.encode():
            raise PosttrainError(f"--smoke would replace {str(file)!r}: give another --output, or remove it")
    note(console, f"{recipe.name}, shrunk to try it; what differs from a real run:")
    for line in small.changes:
        note(console, f"  {line}")
    for file, text in small.files.items():
        write(file, text)
    run(small.recipe, folder, console, ["base"] if known else ())
