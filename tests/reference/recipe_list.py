"""Writes docs/recipe-list.md: every shipped recipe with its source, cost as planned, and what it needs."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sources import SOURCES
from words import table, wrapped

from posttrain.data.settings import PromptFile
from posttrain.planning.budget import Budget
from posttrain.planning.counts import Counts
from posttrain.planning.gpus import Device, gpu
from posttrain.planning.needs import Needs, evaluation_needs, stage_needs
from posttrain.planning.rates import shipped_rates
from posttrain.planning.store import store_of
from posttrain.recipe.file import load_recipe, recipe_text, shipped_recipes
from posttrain.recipe.schema import Recipe, Stage
from posttrain.recipe.suites import published_where
from posttrain.support.wording import duration, short

ROOT = Path(__file__).parent.parent.parent
GPU = "H100 80GB"
SMALLER = ("RTX 5080 16GB", "RTX 4090 24GB", "RTX 5090 32GB", "A40 48GB", GPU, "H200 141GB")
"""The sizes of GPU that are tried, the least first."""
SHIPPED = "posttrain/tiny-sd3"


def page() -> str:
    """The whole page."""
    names = list(shipped_recipes())
    plans = {name: _Plan(load_recipe(name, checks=False)) for name in names}
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    head = (f"<!-- Made by `python tests/reference --recipes` on {datetime.date.today()}, commit {commit}. -->\n"
            f"{HEAD.format(gpu=GPU, date=datetime.date.today())}")  # fmt: skip
    columns = ("recipe", "stages", "least GPU", "steps", f"time on one {GPU}", "disk")
    large = [plan.row(name) for name, plan in plans.items() if not plan.tiny]
    tiny = [(_link(n), stages_of(p.recipe), steps_of(p.recipe)) for n, p in plans.items() if p.tiny]
    parts = [
        wrapped(head) + "\n",
        table(columns, large),
        wrapped(TINY) + "\n",
        table(("recipe", "stages", "steps"), tiny),
        "## Each recipe\n",
    ]
    return "\n".join([*parts, *(p.section(n) for n, p in plans.items())]).rstrip() + "\n"


def stale(text: str) -> list[str]:
    """The shipped recipes of which ``text``, the page, says other stages, steps or purposes than the recipe."""
    found = []
    for name, about in shipped_recipes().items():
        plan = f"{_link(name)} | {stages_of(recipe := load_recipe(name, checks=False))}"
        row = next((line for line in text.splitlines() if line.startswith(f"| {plan} |")), "")
        section = " ".join(text.partition(f"\n### {name}\n")[2][:800].split())
        if f"| {steps_of(recipe)} |" not in row or not section.startswith(about.rstrip(".")):
            found.append(name)
    return found


HEAD = """# Recipes that come with posttrain

`posttrain recipes copy NAME` copies one to edit; `posttrain recipes show NAME` prints it, with a comment at each number that is not
published. All are checked by the tests; those of large models have been planned, and not been run with published weights.

- *Least GPU*: the smallest of 16, 24, 32, 48, 80 and 141 GB on which every stage and the evaluation fit as the recipe stands, by the
  plan. Where a smaller one would do with changed settings, `posttrain plan NAME --gpu ...` lists them.
- *Time*: of all stages, on one {gpu}. Published runs used more GPUs, for about as many GPU-hours. Evaluations are not in it, because
  their prompt files were not on the machine that planned; nor are rewards, loading, and reading images
  ([what is counted](performance.md#before-a-run-posttrain-plan)).
- *Peak*: the memory of a stage, with `micro_batch: auto` as large as fits. So it says less than the least GPU.
- A plan counts GPU-hours and no money: multiply by your price of an hour.

## Models to download
Counted on {date} by the functions of `posttrain plan NAME --gpu "{gpu}"`.
"""
TINY = """## The shipped tiny model
These run on a CPU, most in minutes, and need no download. Measured times: [learning](learning.md), and
`README.md` for the quickstart. `tiny-pretrain` takes hours on a CPU, minutes on a GPU ([Shapes](shapes.md)).
"""


class _Plan:
    """A recipe with what it needs on the stated GPU."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.source = str(getattr(recipe.model, "path", ""))
        self.tiny = self.source == SHIPPED or not self.source
        self.budget = Budget(gpu(GPU), 1, tf32=recipe.tf32, rates=shipped_rates())
        with store_of(recipe.model) as store:
            counts = Counts(recipe.model, cuda=True, store=store)
            self.needs = [] if self.tiny else self._on(gpu(GPU), counts)
            self.least = None if self.tiny else self._least(counts)

    def row(self, name: str) -> tuple[str, ...]:
        seconds = sum(self.budget.seconds(needs) for needs in self.needs)
        disk = sum(needs.disk for needs in self.needs)
        return (
            _link(name),
            stages_of(self.recipe),
            self.least or "more than one",
            steps_of(self.recipe),
            duration(seconds),
            short(disk, "B"),
        )

    def section(self, name: str) -> str:
        about = shipped_recipes()[name].rstrip(".") + "."
        blocks = [about, f"Numbers: {SOURCES[name]}."]
        for words, lines in (
            ("By the plan:", [*self._cost(), *_hints(name)]),
            ("To fetch:", [*self._needed()]),
        ):
            if lines:
                blocks += [words, "\n".join(f"- {line}" for line in lines)]
        return f"### {name}\n\n" + "\n\n".join(map(wrapped, blocks)) + "\n"

    def _cost(self) -> Iterator[str]:
        for needs in self.needs:
            seconds = self.budget.seconds(needs)
            unknown = "time unknown without its prompts" if needs.evaluates else "no time counted"
            line = f"{needs.name}: {duration(seconds) if seconds else unknown}, peak {short(needs.memory.total, 'B')}"
            if needs.decided:
                decided = needs.decided.partition("planned as ")[2].partition(". ")[0]
                line += ", with " + ", ".join(f"`{part.replace(' ', ': ')}`" for part in decided.split(", "))
            yield line

    def _needed(self) -> Iterator[str]:
        if not self.tiny:
            licence = self.recipe.model.origin().get("license_name") or self.recipe.model.origin().get(
                "license"
            )
            yield f"model: `{self.source}`" + (f", licence {licence}" if licence else "")
        seen = set()
        for stage in self.recipe.stages:
            yield from (line for line in _data(stage) if line not in seen and not seen.add(line))
        evaluation = self.recipe.evaluation
        if evaluation is not None:
            yield from (line for line in _prompts(evaluation.prompts) if line not in seen)
        rewards = [r for stage in self.recipe.stages for r in stage.rewards]
        rewards += evaluation.rewards if evaluation is not None else []
        for reward in {reward.type: reward for reward in rewards}.values():
            if size := sum(weights.size for weights in reward.weights.values()):
                yield f"reward: `posttrain rewards fetch {reward.type}`, {short(size, 'B')}"

    def _on(self, device: Device, counts: Counts) -> list[Needs]:
        recipe, limit = self.recipe, device.usable_bytes
        found = [stage_needs(recipe, stage, counts, 1, limit) for stage in recipe.stages]
        return found + ([evaluation_needs(recipe, recipe.evaluation, counts)] if recipe.evaluation else [])

    def _least(self, counts: Counts) -> str | None:
        for name in SMALLER:
            device = gpu(name)
            if all(needs.memory.total <= device.usable_bytes for needs in self._on(device, counts)):
                return name.split()[-1].replace("GB", " GB")
        return None


def stages_of(recipe: Recipe) -> str:
    """The algorithms of the stages in order."""
    return ", then ".join(map(_stage, recipe.stages))


def steps_of(recipe: Recipe) -> str:
    """The steps of each stage, and the samples of a batch."""
    return " + ".join(f"{stage.train.steps} of {stage.train.batch_size}" for stage in recipe.stages)


def _stage(stage: Stage) -> str:
    return f"`{stage.algorithm.type}`" + (" (LoRA)" if stage.tune.type == "lora" else "")


def _link(name: str) -> str:
    return f"[`{name}`](#{name})"


def _data(stage: Stage) -> Iterator[str]:
    for name in ("images", "pairs"):
        if isinstance(path := getattr(stage.data, name, None), Path):
            yield f"data: {name} of your own, `{path.as_posix()}` ([how](data.md))"
    if (prompts := getattr(stage.data, "prompts", None)) is not None:
        yield from _prompts(prompts)


def _prompts(prompts: object) -> Iterator[str]:
    if isinstance(prompts, PromptFile):
        where = published_where(prompts.path)
        yield f"prompts: `{prompts.path.as_posix()}`, " + (
            f"published as {where}" if where else "your own, one a line"
        )


def _hints(name: str) -> Iterator[str]:
    """What the recipe's first comments say of GPUs with less memory, or of fewer GPUs."""
    head = recipe_text(name).split("stages:")[0].splitlines()[1:]
    for line in head:
        if line.startswith("#") and ("--set" in line or "published for" in line):
            text = line.lstrip("# ").replace(" ('posttrain plan' counts it)", "").rstrip(".")
            text = text.replace("That is 32 GPUs", "the published run had 32 GPUs")
            yield re.sub(
                r"(--set \S+(?: --set \S+)*)", r"`\1`", text.replace(", and with it", " and, with it,")
            )
