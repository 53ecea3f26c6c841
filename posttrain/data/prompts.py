"""Reads the prompts that a recipe names, with their metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.lines import Problem, json_object, lines, listing, string, text
from posttrain.data.settings import PromptFile, ShapesPrompts
from posttrain.errors import DataError, PosttrainError

if TYPE_CHECKING:
    from posttrain.reward import Reward

OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml")
"""Endings of files whose lines are no prompts. Read as text, quotes, commas and headings would be prompts."""


def prompt_rows(prompts: PromptFile | ShapesPrompts, rewards: Sequence[Reward] = ()) -> list[dict[str, Any]]:
    """One row per prompt, in order: a dict with ``prompt`` and the prompt's metadata.

    Raises DataError as :func:`read_prompts` does, and if one of ``rewards`` cannot score a Shapes prompt.
    """
    if isinstance(prompts, PromptFile):
        return read_prompts(prompts.path, rewards)
    from posttrain.shapes.dataset import evaluation_prompts  # only Shapes prompts need it

    rows = evaluation_prompts(prompts.count, prompts.seed, prompts.tasks)
    if reasons := {r for reward in rewards for row in rows if (r := reward.prompt_problem(row)) is not None}:
        raise DataError(f"Shapes prompts cannot be scored: {'; '.join(sorted(reasons))}")
    return rows


def read_prompts(path: Path, rewards: Sequence[Reward] = ()) -> list[dict[str, Any]]:
    """One row per line, in the order of the file, repetitions included: a dict with a non-empty ``prompt``.

    A ``.jsonl`` file has one object per line; its other keys are the prompt's metadata. Any other file is
    text with one prompt per line. Blank lines are skipped. No prompt is dropped: DataError is raised, with
    line numbers, if a line cannot be used or if one of ``rewards`` cannot score its prompt. It is raised too
    for a file of OTHER_FORMATS.
    """
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    if (ending := path.suffix.lower()) in OTHER_FORMATS:
        raise DataError(
            f"{path}: prompts are not read from {ending!r} files: give a text file with one prompt per line, "
            "or a '.jsonl' file of objects with 'prompt'"
        )
    parse = _json_row if ending == ".jsonl" else _text_row
    for line, raw in lines(path):
        try:
            row = parse(raw)
            if reasons := [
                reason for reward in rewards if (reason := reward.prompt_problem(row)) is not None
            ]:
                raise ValueError("; ".join(reasons))
            rows.append(row)
        except ValueError as error:
            problems.append(Problem(line, None, str(error)))
    if problems:
        raise DataError(f"{path}: {len(problems)} prompts cannot be used{listing(path, problems)}")
    if not rows:
        raise DataError(f"{path}: no prompt; expected one per line, or '.jsonl' objects with 'prompt'")
    return rows


def distinct_prompts(prompts: PromptFile | ShapesPrompts) -> int | None:
    """How many distinct prompts there are; None if their file is not on this machine."""
    try:
        return len({row["prompt"] for row in prompt_rows(prompts)})
    except (OSError, PosttrainError):
        return None


def _json_row(raw: bytes) -> dict[str, Any]:
    row = json_object(raw)
    if not isinstance(row.get("tag", ""), str):
        raise ValueError(f"'tag' must be text, not {json.dumps(row['tag'])[:60]}")
    return {**row, "prompt": string(row, "prompt")}


def _text_row(raw: bytes) -> dict[str, Any]:
    if raw.startswith(b"{") and _is_object(raw):
        raise ValueError("a JSON object in a text file; name the file '.jsonl' if its rows are objects")
    if b"\r" in raw:  # a file of an old Mac would be one prompt
        raise ValueError("a carriage return within the line: each line must end in a line feed")
    return {"prompt": string({"prompt": text(raw)}, "prompt")}


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False
