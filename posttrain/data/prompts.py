"""Which prompts does a recipe name, and with which metadata?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.data.lines import Problem, json_object, lines, listing, string, text
from posttrain.data.spec import PromptFile, ShapesPrompts
from posttrain.errors import DataError


def prompt_rows(prompts: PromptFile | ShapesPrompts) -> list[dict[str, Any]]:
    """One dict with at least ``prompt`` for each, in order. Raises DataError as :func:`read_prompts`."""
    if isinstance(prompts, PromptFile):
        return read_prompts(prompts.path)
    from posttrain.shapes.dataset import evaluation_prompts  # needed in the Shapes world only

    return evaluation_prompts(prompts.count, prompts.seed)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """One dict with at least a non-empty ``prompt`` a row, in the order of the file, repetitions kept.

    A ``.jsonl`` file has one object a line, whose other keys are kept as they are; any other file is text
    with one prompt a line. Blank lines are skipped. Raises DataError with the numbers of the lines that
    cannot be used: a prompt is never dropped.
    """
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    parse = _json_row if path.suffix.lower() == ".jsonl" else _text_row
    for line, raw in lines(path):
        try:
            rows.append(parse(raw))
        except ValueError as error:
            problems.append(Problem(line, None, str(error)))
    if problems:
        raise DataError(f"{path}: {len(problems)} prompts cannot be used{listing(path, problems)}")
    if not rows:
        raise DataError(f"{path}: no prompt; expected one a line, or '.jsonl' objects with 'prompt'")
    return rows


def _json_row(raw: bytes) -> dict[str, Any]:
    row = json_object(raw)
    return {**row, "prompt": string(row, "prompt")}


def _text_row(raw: bytes) -> dict[str, Any]:
    if raw.startswith(b"{") and _is_object(raw):
        raise ValueError("a JSON object in a text file; name the file '.jsonl' if its rows are objects")
    return {"prompt": string({"prompt": text(raw)}, "prompt")}


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except ValueError:
        return False
