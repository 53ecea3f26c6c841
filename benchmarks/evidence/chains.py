"""The chains: DiffusionNFT and Flow-GRPO from the base, after SFT and after SOAR, and AWM from the base.

All have the same total cost, as far as whole readings allow: ``awm-kl`` costs 2 % less. The RL stage is
that of the shipped recipe, ``shapes-nft``, ``shapes-grpo`` or ``shapes-awm``, shortened by what the stage
before it cost; ``awm`` has no KL term. SFT and SOAR before it cost the same, so a seed's two chains after
them have equal RL stages, of equal prompts and noise. A seed's RL is measured four times: before it, and
after each third.

What it takes, at 100 forward-equivalents a second of one busy CPU core (cost in the records, 2026-11-28):

- RL of a seed: 4 chains x 230k from the base, 4 x 161k after SFT or SOAR; the stages before: 2 x 69k. 1.7M a
  seed, 5.1M with three seeds: about 14 core-hours.
- 27 evaluations a seed of 720 images x 20 forwards: 1.2M with three seeds, about 3 core-hours.
- The arms: 14 recipes are 1.3M a seed, and measuring 14 arms and the base takes 58k each, 0.9M. Five seeds
  are 11M: about 30 core-hours.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import posttrain
from benchmarks.evidence import arms
from benchmarks.evidence.identity import identity, is_made
from benchmarks.evidence.measure import EVALUATION, cost, device_of_this_machine, folder_name, keep, scored
from posttrain import Recipe, load_recipe
from posttrain.support.files import locked

TOTAL = 60 * 192 * 20
"""Forward-equivalents of a chain: 60 iterations of ``shapes-nft``."""
BEFORE = {"sft": 721, "soar": 94}
"""Steps of SFT and SOAR before RL: both 69.2k forward-equivalents."""
READINGS = 3
"""Evaluations of an RL stage, after equal parts of its steps; one more comes before it."""
HELD_OUT = {
    **EVALUATION, "prompts": {"type": "shapes", "count": 240, "seed": 2028}, "images_per_prompt": 3,
    "steps": 20, "guidance": 1.0, "keep": "png",
}  # fmt: skip
"""All six kinds of task; without guidance, as RL samples."""


class RL(NamedTuple):
    """A shipped recipe of one RL stage."""

    recipe: str
    stage: str
    dear: int
    """Forward-equivalents of an optimizer step, if no sample is left out."""
    changes: tuple[str, ...] = ()
    """Fields of the stage that are not the recipe's, as ``path=value``."""


STAGES = {
    # 192 images: 8 steps of the rollout, and at 3 noise levels the old policy and a forward with backward
    "nft": RL("shapes-nft", "nft", 192 * (8 + 3 * (1 + 3))),
    # 192 images: 5 steps, and a forward with backward of one of them
    "grpo": RL("shapes-grpo", "grpo", 192 * (5 + 3)),
    # as nft: the ratio's forward in place of the old policy's; without a KL term one seed of three collapsed
    "awm": RL("shapes-awm", "awm", 192 * (8 + 3 * (1 + 3)), ("algorithm.beta=0",)),
    # and the reference's forward
    "awm-kl": RL("shapes-awm", "awm", 192 * (8 + 3 * (1 + 1 + 3))),
}
CHAINS: dict[str, tuple[str, str]] = {
    **{"-".join(filter(None, (b, rl))): (b, rl) for rl in ("nft", "grpo") for b in ("", *BEFORE)},
    **{awm: ("", awm) for awm in ("awm", "awm-kl")},
}
"""A chain's name -> what comes before RL, if anything, and the RL stage."""
GROUPS = {"arms": ["base", *arms.ARMS], "chains": [*CHAINS]}
"""What a name such as ``--only arms`` stands for."""
AGAINST: dict[str, tuple[str, ...]] = {
    "sft-nft": ("nft",),
    "soar-nft": ("nft", "sft-nft"),
    "sft-grpo": ("grpo",),
    "soar-grpo": ("grpo", "sft-grpo"),
    "awm": ("nft",),
    "awm-kl": ("nft", "awm"),
}
"""The chains that each is compared with, chosen before any was run."""


def length(name: str) -> int:
    """Optimizer steps of a chain's RL stage, a multiple of READINGS."""
    before, rl = CHAINS[name]
    algorithm = arms.ARMS[before].algorithm if before else {}
    spent = BEFORE[before] * arms.BATCH * arms.forwards(algorithm) if before else 0
    return READINGS * round((TOTAL - spent) / STAGES[rl].dear / READINGS)


def rl_recipe(name: str, seed: int, start: str, steps: int | None = None) -> Recipe:
    """The RL stage of a chain as a run of its own, from the weights ``start``: so equal seeds have equal
    prompts and noise, whatever came before. ``steps``, rounded up to whole readings, replaces its length."""
    of, total = STAGES[CHAINS[name][1]], steps or length(name)
    total = READINGS * -(-total // READINGS)
    at, every = f"stages.{of.stage}", total // READINGS
    values = {
        "name": f"evidence-{name}", "seed": seed, "tracker": "none", "evaluation": "null",
        f"{at}.start_from": start, f"{at}.train.steps": total, f"{at}.train.sample_every": "null",
        f"{at}.train.checkpoint_every": every, f"{at}.train.keep_every": every,
    }  # fmt: skip
    if total <= 5:
        values[f"{at}.train.warmup_steps"] = 0
    changes = [f"{at}.{change}" for change in of.changes]
    return load_recipe(of.recipe, [f"{key}={value}" for key, value in values.items()] + changes, checks=False)


def chain_identity(name: str, steps: int | None, samples: int | None) -> dict[str, Any]:
    """By what the record of a chain is made."""
    before = CHAINS[name][0]
    recipes = [arms.recipe(before, 0, steps or BEFORE[before])] if before else []
    measures = {"held out": HELD_OUT, "readings": READINGS, "samples": samples}
    return identity([*recipes, rl_recipe(name, 0, "base", steps)], measures)


def measured_chain(
    name: str, seed: int, runs: Path, records: Path, *, steps: int | None = None, samples: int | None = None
) -> Path:
    """The record of a chain. Arguments, resuming and errors as :func:`benchmarks.evidence.measure.measured`.

    The folder of what comes before RL stays, for the other chain that starts from it.
    """
    record, by = records / f"{name}-{seed}.json", chain_identity(name, steps, samples)
    if is_made(record, by):
        return record
    (before, rl), device = CHAINS[name], device_of_this_machine()
    settings = {**HELD_OUT, "seed": seed}
    first, start, spent = _started(before, seed, runs, settings, steps, samples)
    rl_run, stage = rl_recipe(name, seed, start, steps), STAGES[rl].stage
    folder = runs / folder_name(name, rl_run)
    result = posttrain.run(rl_run, output=folder)
    rows = [row for row in result.metrics(stage) if "reward" in row]
    total = int(result.cost(stage)["steps"])
    marks = [total * part // READINGS for part in range(READINGS + 1)]
    about: dict[str, Any] = {"arm": name, "seed": seed, "identity": by, **first}
    about["evaluations"] = {"0": about.pop("scores")}
    about["readings"] = [{"step": 0, "forward_equivalents": spent.get("forward_equivalents", 0)}]
    for number, (last, mark) in enumerate(pairwise(marks), 1):
        weights = str(folder / stage / "checkpoints" / f"step-{mark:08d}")
        about |= scored(weights, settings, samples, folder / f"eval-{number}", device)
        about["evaluations"][str(number)] = about.pop("scores")
        part = [row for row in rows if last < row["step"] <= mark]
        about["readings"].append(
            {
                "step": mark,
                "forward_equivalents": part[-1]["forward_equivalents"] + spent.get("forward_equivalents", 0),
                "reward": fmean(row["reward"] for row in part),
            }
        )
    about["rewards"] = [round(row["reward"], 4) for row in rows]
    own = cost(result, stage)
    about["cost"] = {key: value + spent.get(key, 0) for key, value in own.items()}
    keep(record, about)
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _started(
    before: str,
    seed: int,
    runs: Path,
    settings: Mapping[str, Any],
    steps: int | None,
    samples: int | None,
) -> tuple[dict[str, Any], str, dict[str, float]]:
    """The scores before RL, the weights that it starts from, and what they cost. Both chains from the same
    weights share them."""
    if before:
        recipe = arms.recipe(before, seed, steps or BEFORE[before])
        folder = runs / folder_name(f"before-{before}", recipe)
    else:
        recipe, folder = None, runs / f"before-base-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(runs / f".{folder.name}.lock"):  # the other chain may be here at the same time
        start, weights, spent = "base", arms.MODEL["path"], {}
        if recipe is not None:
            result = posttrain.run(recipe, output=folder / "run")
            weights, spent = str(result.final("trained")), cost(result, "trained")
            start = str(folder / "run" / "trained")
        return scored(weights, settings, samples, folder / "eval", device_of_this_machine()), start, spent
