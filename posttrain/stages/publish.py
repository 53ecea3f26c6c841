"""Publishes what a stage trained: ``final/`` for other tools, and ``stage.json`` with what it cost."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from posttrain.engine.trainer import EMA
from posttrain.errors import TrainingError
from posttrain.model import torch_dtype
from posttrain.stages.account import forward_equivalents
from posttrain.stages.lineage import DESCRIPTION
from posttrain.stages.stage_run import StageRun, Training
from posttrain.support.device import peak_memory
from posttrain.support.files import published, write


def publish(training: Training, description: dict[str, Any]) -> None:
    """Write ``final/`` and then ``stage.json``, which says that the stage is finished.

    Every process calls it, and the main one writes. ``description`` becomes ``posttrain.json`` (see
    :mod:`posttrain.stages.lineage`). Closes the strategy. Raises TrainingError, before anything is written,
    where nothing was trained, and PosttrainError where the disk is full.
    """
    run, strategy = training.run, training.strategy
    summary = summarise(training)
    weights = _exported_weights(training)
    strategy.close()
    if run.world.is_main:
        _write_artifact(run, weights, description)
        write(run.folder / "stage.json", json.dumps(summary, indent=2))
    run.world.barrier()


def summarise(training: Training) -> dict[str, Any]:
    """The content of ``stage.json``. Raises TrainingError where nothing was trained."""
    run, account, policy = training.run, training.account, training.policy
    world, layout = run.world, training.strategy.layout
    if not account.updates or not policy.trained:
        reason = ": no group of samples had a spread of rewards" if account.samples else ""
        reason = ": it was rolled back to its start" if account.ended_at == 0 else reason
        raise TrainingError(f"stage {run.stage.name!r} trained nothing{reason}")
    skipped = chain.from_iterable(world.gather_objects(training.source.skipped()))
    return {
        "steps": run.stage.train.steps if account.ended_at is None else account.ended_at,
        "updates": account.updates,
        "samples": account.samples,
        "seconds": account.seconds,
        "forward_equivalents": forward_equivalents(policy, world),
        "images_per_second": account.samples / account.seconds,
        "peak_memory_bytes": world.max(peak_memory(policy.model.device)),
        "trainable_parameters": sum(layout.shape(p).numel() for p in policy.trained.values()),
        "parallel": {**run.recipe.parallel.model_dump(mode="json"), "processes": world.size},
        "skipped": list(dict.fromkeys(skipped)),
        "alarms": account.alarms,
    }


def _exported_weights(training: Training) -> dict[str, Tensor]:
    """Name -> whole weight of the EMA, or of the policy without one. Empty in all but the main process."""
    world, ema = training.run.world, training.run.stage.train.ema
    return {
        name: _in_own_memory(tensor.cpu() if world.size > 1 else tensor)
        for name, tensor in training.policy.gathered_weights(EMA if ema is not None else None)
        if world.is_main
    }


def _write_artifact(run: StageRun, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
    stage = run.stage
    dtype = torch_dtype(stage.export_dtype) if stage.tune.type == "full" else torch.float32
    needs = dtype.itemsize * sum(tensor.numel() for tensor in weights.values())
    with published(run.folder / "final", needs) as folder:
        if stage.tune.type == "lora":
            run.model.save_lora(folder, weights)
        else:
            run.model.save(folder, stage.export_dtype, weights)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))


def _in_own_memory(tensor: Tensor) -> Tensor:
    """``tensor``, copied if it is a view into a larger one: safetensors refuses to write such views."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
