"""Writes a comparison of evaluations as an HTML page, in the manner of a run's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.evaluation.compare import Comparison, Evaluated
from posttrain.evaluation.likeness import unlike
from posttrain.evaluation.report.gallery import Column, Versus, changed_prompts, gallery
from posttrain.evaluation.report.html import html
from posttrain.evaluation.report.meaning import meaning
from posttrain.evaluation.report.results import Sample
from posttrain.evaluation.report.scores import score_cell
from posttrain.evaluation.report.settings import evaluation_lines, model_lines
from posttrain.evaluation.report.verdict import Gain
from posttrain.evaluation.report.view import Page, Row, Table
from posttrain.support.files import write
from posttrain.support.wording import counted

NOTE = (
    "Each cell has the mean over the shared samples, and the paired difference from {first} with its 95 % "
    "bootstrap interval over prompts. The drawing shows them beside a line at 0; only a difference whose "
    "interval leaves out 0 has a colour. The best mean is bold."
)


def write_page(comparison: Comparison, target: Path, prompts: int) -> None:
    """Write an HTML page with the scores, and the images of up to ``prompts`` shared samples side by side.

    The page needs no network. Raises DamagedError for an image that cannot be read, and PosttrainError if
    ``target`` cannot be written.
    """
    evaluations = comparison.evaluations
    alike = not any(unlike({one.name: one.card for one in evaluations}))
    first, shared = evaluations[0], counted(len(comparison.keys), "sample")
    columns = [_column(comparison, of, i) for i, of in enumerate(evaluations)]
    score = comparison.scores[0]
    versus = Versus(0, len(columns) - 1, score, first.card["scores"][score]["higher_is_better"])
    page = Page(
        title=" · ".join(of.name for of in evaluations),
        lead=f"{shared} of the same prompts{' and noise' if alike else ''}, against {first.name}.",
        remarks=comparison.remarks,
        meanings=list(_meanings(comparison)),
        scores=_table(comparison, [name for name in comparison.scores if "/" not in name], "Results"),
        details=_table(
            comparison, [name for name in comparison.scores if "/" in name], "Details of the scores"
        ),
        scores_note=NOTE.format(first=first.name),
        images=gallery(columns, versus, prompts, alike=alike),
        changed=changed_prompts(columns, versus),
        settings=[(of.name, [*model_lines(of.card), *evaluation_lines(of.card)], "") for of in evaluations],
    )
    write(target, html(page))


def _column(comparison: Comparison, of: Evaluated, number: int) -> Column:
    """The shared samples of one evaluation, with the images that are on the disk."""
    images: dict[Sample, Path] = {}
    for key in comparison.keys:
        if (file := of.image(key)) is not None and file.is_file():
            images[key] = file
    return Column(of.name, {key: of.records[key]["scores"] for key in comparison.keys}, images, number)


def _meanings(comparison: Comparison) -> Iterator[tuple[str, str]]:
    card = comparison.evaluations[0].card
    for name in comparison.scores:
        if "/" not in name:
            scorer = card.get("scorers", {}).get(name, {})
            yield name, meaning(scorer, higher=card["scores"][name]["higher_is_better"])


def _table(comparison: Comparison, names: Sequence[str], title: str) -> Table | None:
    """A row for each evaluation, and a column for each score."""
    if not names:
        return None
    first, *others = comparison.evaluations
    columns = []
    for name in names:
        higher = first.card["scores"][name]["higher_is_better"]
        means = [comparison.mean(of, name) for of in comparison.evaluations]
        gains = [None, *(Gain(*comparison.difference(of, name), higher) for of in others)]
        best = max(means) if higher else min(means)
        columns.append(
            [
                score_cell({"mean": mean}, gain, gains, best=mean == best)
                for mean, gain in zip(means, gains, strict=True)
            ]
        )
    rows = [
        Row(of.name, [column[i] for column in columns], key=i) for i, of in enumerate(comparison.evaluations)
    ]
    return Table(title, "model", [comparison.heading(name) for name in names], rows)
