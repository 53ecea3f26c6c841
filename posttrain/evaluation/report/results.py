"""Reads a run folder into plain records, for the table and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.engine.tracker import METRICS, damaged_lines, read_metrics
from posttrain.evaluation.parts import read_what_is_whole
from posttrain.recipe.schema import BASE
from posttrain.support.records import read_object
from posttrain.support.wording import short
from posttrain.weights.run_folders import RUN, SUMMARY

AGAIN = "'posttrain run' with its recipe makes it again"
NEVER = "only the stage trained afresh (--fresh) makes it again"
"""What makes a file again that is damaged or missing."""
ALARM = "alarm/"
"""How the names of alarms begin in the metrics."""
Sample = tuple[str, int]
"""A prompt, and the number of the image among those of the prompt."""


@dataclass
class StageResult:
    """The results of one stage, or of the base model. What a stage has not written yet is empty."""

    name: str
    algorithm: str | None
    parent: str | None
    account: dict[str, Any] = field(default_factory=dict)
    """The content of ``stage.json``: steps, forward_equivalents, images_per_second, and so on."""
    card: dict[str, Any] = field(default_factory=dict)
    """The content of ``evaluation/eval.json``."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The rows of ``evaluation/records.jsonl``."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """The rows of ``metrics.jsonl``."""
    images: dict[Sample, Path] = field(default_factory=dict)
    """The images that the evaluation kept: those of its grid first."""
    grids: dict[int, Path] = field(default_factory=dict)
    """Step -> the grid of images that was drawn while the stage trained."""
    environment: dict[str, Any] = field(default_factory=dict)
    """The content of the run's ``environment.json``."""
    damage: list[str] = field(default_factory=list)
    """A line for each file that is damaged or missing, although the rest can be read."""

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Name of a score -> its mean, low, high, count and higher_is_better."""
        return self.card.get("scores", {})

    @property
    def scored(self) -> dict[Sample, dict[str, float]]:
        """The scores of each sample of the evaluation."""
        return {(row["prompt"], row["index"]): row["scores"] for row in self.samples}


@dataclass
class Results:
    """The results of a run. The first stage is the base model."""

    name: str
    stages: list[StageResult]
    recipe: str
    environment: dict[str, Any]
    bases: dict[str, StageResult] = field(default_factory=dict)
    """Name of a stage -> the base model of its own run, where several runs are joined."""
    missing: list[str] = field(default_factory=list)
    """A line for each file of the run itself that is missing."""

    def base_of(self, stage: StageResult) -> StageResult:
        """The base model that the gain of ``stage`` is measured against."""
        return self.bases.get(stage.name, self.stages[0])

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """Name of a stage -> its result card."""
        return {stage.name: stage.card for stage in self.stages}

    @property
    def damage(self) -> list[str]:
        """A line for each file that is damaged or missing, although the rest can be read."""
        return [*self.missing, *(line for stage in self.stages for line in stage.damage)]

    @property
    def score_names(self) -> list[str]:
        """The names of the scores, in the order in which they were measured."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.scores))


def load_results(run: Path) -> Results:
    """Read a run folder, finished or not.

    Raises DamagedError for a damaged description or ``stage.json``. What else is damaged is left out, and
    :attr:`Results.damage` tells it.
    """
    description, environment = _json(run / RUN), _json(run / "environment.json")
    names = ("recipe.yaml", "environment.json") if description else ()
    missing = [f"{str(run / name)!r} is missing; {AGAIN}" for name in names if not (run / name).is_file()]
    return Results(
        description.get("name", run.name),
        [_stage(run / row["name"], row, environment) for row in description.get("stages", [])],
        (run / "recipe.yaml").read_text("utf-8") if (run / "recipe.yaml").is_file() else "",
        environment,
        missing=missing,
    )


def damage_of(folder: Path, *, is_finished: bool, is_evaluated: bool) -> Iterator[str]:
    """A line for each damaged or missing file of what the stage in ``folder`` trained, as far as the rest can
    be read; each tells what makes the file again."""
    metrics = folder / METRICS
    if is_evaluated and not is_finished:
        yield f"{str(folder / SUMMARY)!r} is missing, but {folder.name} was evaluated; {AGAIN}"
    if lines := damaged_lines(metrics):
        yield f"{str(metrics)!r} is damaged in line {', '.join(map(str, lines))}, left out here; {NEVER}"
    elif is_finished and not read_metrics(metrics):
        yield f"{str(metrics)!r} {'has no rows' if metrics.is_file() else 'is missing'}; {NEVER}"


def alarms_of(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each alarm in the rows of ``metrics.jsonl``."""
    names = [(row["step"], name) for row in metrics for name in row if name.startswith(ALARM)]
    return [f"step {step}: {name.removeprefix(ALARM)}" for step, name in names]


def cost_texts(stage: StageResult) -> list[str]:
    """What a stage cost: forward-equivalents, images per second, peak memory, steps, trained parameters."""
    account = stage.account
    rate = account.get("images_per_second")
    return [
        short(account.get("forward_equivalents")),
        "–" if rate is None else f"{rate:.1f}",
        short(account.get("peak_memory_bytes"), "B"),
        short(account.get("steps")),
        short(account.get("trainable_parameters")),
    ]


def _stage(folder: Path, row: dict[str, Any], environment: dict[str, Any]) -> StageResult:
    evaluation = folder / "evaluation"
    card, samples, damage = read_what_is_whole(evaluation, "mean", "low", "high")
    account, metrics = _json(folder / SUMMARY, "steps"), read_metrics(folder / METRICS)
    more = damage_of(folder, is_finished=bool(account), is_evaluated=bool(card))
    return StageResult(
        row["name"],
        row["algorithm"],
        row["parent"],
        account,
        card,
        samples,
        metrics,
        _images(evaluation, card, samples),
        _grids(folder / "samples"),
        environment,
        [*([damage] if damage else []), *(more if row["name"] != BASE else ())],
    )


def _images(evaluation: Path, card: dict[str, Any], samples: list[dict[str, Any]]) -> dict[Sample, Path]:
    """The files of the images that an evaluation kept, and that are still there."""
    # by its number: a file that is gone must not move the others to wrong prompts
    in_grid = [(p, evaluation / "grid" / f"{n:03d}.png") for n, p in enumerate(card.get("grid_prompts", []))]
    kept = {(row["prompt"], row["index"]): evaluation / row["image"] for row in samples if row.get("image")}
    images = {(prompt, 0): file for prompt, file in in_grid if file.is_file()}
    return images | {sample: f for sample, f in kept.items() if sample not in images and f.is_file()}


def _grids(folder: Path) -> dict[int, Path]:
    named = {file.stem.removeprefix("step-"): file for file in sorted(folder.glob("step-*.png"))}
    return {int(step): file for step, file in named.items() if step.isdecimal()}


def _json(path: Path, *keys: str) -> dict[str, Any]:
    return read_object(path, *keys) if path.is_file() else {}
