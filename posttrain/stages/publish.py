"""Publishes what a stage trained: ``final/`` for other tools, and ``stage.json`` with what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from posttrain.engine.trainer import EMA
from posttrain.errors import TrainingError
from posttrain.model import torch_dtype
from posttrain.policy.whole_weights import whole_weights
from posttrain.stages.account import forward_equivalents
from posttrain.stages.lineage import DESCRIPTION, EXACT, FINAL
from posttrain.stages.model_card import README, card_text
from posttrain.stages.stage_run import StageRun, Training
from posttrain.stages.stage_state import SUMMARY
from posttrain.support.device import peak_memory
from posttrain.support.files import published, remove, write
from posttrain.support.wording import counted, short
from posttrain.weights.files import bytes_beside
from posttrain.weights.writing import Entry

LARGE = 10**9
"""From so many bytes on, the user is told of the copies in ``final/``."""


def publish(training: Training, description: dict[str, Any]) -> None:
    """Write ``final/`` and then ``stage.json``, which says that the stage is finished.

    Every process calls it, and the main one writes, weight by weight: it gathers one only when it writes it.
    ``description`` becomes ``posttrain.json`` (see :mod:`posttrain.stages.lineage`). Closes the strategy.
    Raises TrainingError, before anything is written, where nothing was trained, and PosttrainError where the
    disk is full.
    """
    run, strategy = training.run, training.strategy
    summary = summarise(training)
    exported = EMA if run.stage.train.ema is not None else None
    with whole_weights(training.policy, exported, run.world) as weights:
        if run.world.is_main:
            _write_artifact(run, weights, description)
    strategy.close()
    if run.world.is_main:
        write(run.folder / SUMMARY, json.dumps(summary, indent=2))
    run.world.barrier()


def summarise(training: Training) -> dict[str, Any]:
    """The content of ``stage.json``. Raises TrainingError where nothing was trained."""
    run, account, policy = training.run, training.account, training.policy
    world, layout = run.world, training.strategy.layout
    if not account.updates or not policy.trained:
        why = "no group of samples had a spread of rewards"
        why = why if run.stage.algorithm.uses_rewards else "all items had weight 0"
        reason = f": {why}" if account.samples else ""
        reason = ": it was rolled back to its start" if account.ended_at == 0 else reason
        reason = ": no step was finite" if account.refused else reason
        raise TrainingError(f"stage {run.stage.name!r} trained nothing{reason}")
    steps = counted(account.refused, "step")
    refused = [f"{run.stage.name}: {steps} refused: not finite"] if account.refused else []
    return {
        "steps": run.stage.train.steps if account.ended_at is None else account.ended_at,
        "updates": account.updates,
        "refused_steps": account.refused,
        "samples": account.samples,
        "seconds": account.seconds,
        "forward_equivalents": forward_equivalents(policy, world),
        "images_per_second": account.samples / account.seconds,
        "peak_memory_bytes": world.max(peak_memory(policy.model.device)),
        "trainable_parameters": sum(layout.shape(p).numel() for p in policy.trained.values()),
        "device": policy.model.device.type,
        "threads": torch.get_num_threads(),
        "parallel": {**run.recipe.parallel.model_dump(mode="json"), "processes": world.size},
        "skipped": training.skipped(),
        "alarms": list(dict.fromkeys([*account.alarms, *refused])),
    }


def _write_artifact(run: StageRun, weights: Mapping[str, Entry], description: dict[str, Any]) -> None:
    """Write ``final/`` and, where it rounds the weights, before it those from which later stages start."""
    stage, dtype = run.stage, run.recipe.export_dtype(run.stage)
    numbers, itemsize = sum(math.prod(e.shape) for e in weights.values()), torch_dtype(dtype).itemsize
    needs = itemsize * numbers
    if stage.tune.type == "full":
        needs += (beside := bytes_beside("transformer", run.recipe.model.weight_files(), itemsize) or 0)
        if beside >= LARGE:
            run.note(
                f"{stage.name}: final/ gets its own copy of what was not trained, {short(beside, 'B')}; what "
                f"is in {dtype} already takes no room where the file system shares blocks (btrfs, xfs)"
            )
    if dtype != "fp32":
        with published(run.folder / EXACT, torch.float32.itemsize * numbers) as folder:
            run.model.save_exact(folder, weights)
    with published(run.folder / FINAL, needs) as folder:
        if stage.tune.type == "lora":
            run.model.save_lora(folder, weights)
        else:
            run.model.save(folder, dtype, weights)
        (folder / DESCRIPTION).write_text(json.dumps({**description, "dtype": dtype}, indent=2), "utf-8")
        (folder / README).write_text(card_text(run.run_folder, stage.name), "utf-8")
    if dtype == "fp32" and (run.folder / EXACT).is_dir():
        remove(run.folder / EXACT)  # of an earlier precision
