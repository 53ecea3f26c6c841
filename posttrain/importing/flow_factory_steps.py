"""Writes Flow-Factory's batches, steps and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.group_rl import STEPS

OPTIMIZER = {
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.adam_weight_decay",
    "betas": "train.adam_betas",
    "eps": "train.adam_epsilon",
    "max_grad_norm": "train.max_grad_norm",
}
"""Key of an optimizer's block, and our field -> the older setting, which is read where the key is missing."""


def put_steps(s: Settings, d: Draft, processes: int, *, pairs: bool) -> None:
    """Write batches, steps and intervals of an algorithm that samples."""
    group, prompts = s["train.group_size"], s["train.unique_sample_num_per_epoch"]
    total = group * prompts
    names = ("train.unique_sample_num_per_epoch", "train.group_size")
    d.put("stage.train.batch_size", total, *names, note=f"{prompts} prompts x {group}")
    batches = (prompts if pairs else total) // (processes * s["train.per_device_batch_size"])
    if s["train.gradient_accumulation_steps"] == "auto":
        updates = min(s["train.gradient_step_per_epoch"], max(batches, 1))
        d.put("stage.train.steps_per_batch", updates, "train.gradient_step_per_epoch")
        d.idle["train.gradient_accumulation_steps"] = "auto: gradient_step_per_epoch says it"
        d.idle["num_processes"] = "a batch is counted over all processes"
    else:
        updates = max(1, batches // _accumulated(s))
        names = ("train.gradient_accumulation_steps", "train.per_device_batch_size", "num_processes")
        d.put("stage.train.steps_per_batch", updates, *names)
        d.idle["train.gradient_step_per_epoch"] = "gradient_accumulation_steps says it"
    _counted(s, d, updates)


def _accumulated(s: Settings) -> int:
    count = s["train.gradient_accumulation_steps"]
    if count == "auto":
        return 1
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise s.refused("train.gradient_accumulation_steps", "auto, or a whole number of 1 or more")
    return count


def _counted(s: Settings, d: Draft, updates: int) -> None:
    """Write steps and intervals, which Flow-Factory counts in epochs of ``updates`` steps."""
    epochs = s["train.max_epochs"]
    if epochs is None or epochs < 0:
        note = "ours: Flow-Factory runs until it is stopped. It may grow"
        d.put("stage.train.steps", STEPS // updates * updates, note=note)
    else:
        d.put("stage.train.steps", max(epochs, 1) * updates, "train.max_epochs", note=f"{epochs} x {updates}")
    if s["log.save_freq"]:
        d.put("stage.train.checkpoint_every", s["log.save_freq"] * updates, "log.save_freq")
        d.put("stage.train.sample_every", s["log.save_freq"] * updates, "log.save_freq")
    if s["eval.eval_freq"]:
        d.put("stage.monitor.every", s["eval.eval_freq"] * updates, "eval.eval_freq")


def put_offline_steps(s: Settings, d: Draft, processes: int) -> None:
    """Write batches and steps of training on images."""
    accumulated = _accumulated(s)
    each = s["train.per_device_batch_size"]
    sizes = f"{each} x {accumulated} x {processes} processes"
    names = ("train.per_device_batch_size", "train.gradient_accumulation_steps", "num_processes")
    d.put("stage.train.batch_size", each * accumulated * processes, *names, note=sizes)
    d.put("stage.train.steps", 1000, note="ours: max_epochs x images / batch_size")
    if "train.max_epochs" in s:
        d.lost["train.max_epochs"] = "posttrain counts steps: epochs x images / batch_size"


def put_optimizer(s: Settings, d: Draft) -> None:
    """Write learning rate, AdamW's settings and memory."""
    blocks = blocks_of(s["optimizers"])
    first = blocks[0] if blocks and isinstance(blocks[0], Mapping) else {}
    for key, old in OPTIMIZER.items():
        flag, value = ("optimizers", first[key]) if key in first else (old, s[old])
        pair = key == "betas" and isinstance(value, list | tuple)
        numbers = [s.number(flag, number) for number in value] if pair else s.number(flag, value)
        d.put(f"stage.train.{key}", numbers, flag)
    for block in blocks:
        names = block if isinstance(block, Mapping) else ()
        s.unknown |= {f"optimizers.{n}": block[n] for n in names if n not in (*OPTIMIZER, "name")}
    if len(blocks) > 1:
        d.lost["optimizers"] = "a stage has one optimizer: the first is taken"
    d.put("stage.train.micro_batch", "auto", note="ours: changes rounding only")
    on = s["train.enable_gradient_checkpointing"]
    checkpointing = "off" if on is False or on == "none" else "full" if on is True else "auto"
    d.put("stage.train.gradient_checkpointing", checkpointing, "train.enable_gradient_checkpointing")


def blocks_of(value: Any) -> list[Any]:
    """A list of blocks, which may be one block."""
    return value if isinstance(value, list) else [value] if value else []
