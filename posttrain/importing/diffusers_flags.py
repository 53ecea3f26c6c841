"""Holds and writes what HY-SOAR and SimpleTuner share: many flags of diffusers' training scripts."""

from __future__ import annotations

from pathlib import PurePosixPath

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag
from posttrain.importing.models import named, put_tracker

COMMON: dict[str, Flag] = {
    "pretrained_model_name_or_path": Flag(),
    "revision": Flag(),
    "seed": Flag("int"),
    "train_batch_size": Flag("int", 4, least=1),
    "num_train_epochs": Flag("int", 1),
    "gradient_accumulation_steps": Flag("int", 1, least=1),
    "lr_warmup_steps": Flag("int", 0),
    "adam_beta1": Flag("float", 0.9),
    "adam_beta2": Flag("float", 0.999),
    "adam_epsilon": Flag("float", 1e-8),
}
SCHEDULES = {
    "constant": "constant",
    "cosine": "cosine",
    "linear": "linear",
    "constant_with_warmup": "constant",
}


def put_head(draft: Draft, otherwise: str) -> None:
    """Write the run's name, which is ``otherwise`` without an output folder, and the tracker."""
    folder = PurePosixPath(draft.settings["output_dir"] or "")
    draft.put("name", named(folder.name, otherwise), "output_dir")
    put_tracker(draft, "report_to")


def put_training(draft: Draft, processes: int, *counted: str) -> int:
    """Write steps, batch, schedule and checkpointing of activations; returns the batch. ``counted`` are the
    flags that say the number of processes. Raises PosttrainError."""
    s = draft.settings
    if not (steps := s["max_train_steps"]):
        raise PosttrainError(
            "posttrain counts steps, not epochs: give --max_train_steps, which is epochs x images / batch "
            "size"
        )
    draft.idle["num_train_epochs"] = "max_train_steps says how long it trains"
    each, accumulated = s["train_batch_size"], s["gradient_accumulation_steps"]
    flags = ("train_batch_size", "gradient_accumulation_steps", *counted)
    note = f"{each} x {accumulated} x {processes} processes"
    draft.put("stage.train.batch_size", each * accumulated * processes, *flags, note=note)
    draft.put("stage.train.micro_batch", "auto", note="ours: changes rounding only")
    _schedule(draft, steps)
    draft.same({"stage.train.steps": "max_train_steps", "stage.train.eps": "adam_epsilon"})
    draft.either("stage.train.gradient_checkpointing", "gradient_checkpointing", "full", "off")
    return each * accumulated * processes


def _schedule(draft: Draft, steps: int) -> None:
    """Write ``schedule`` and ``warmup_steps``, as diffusers' and transformers' schedulers mean them."""
    s = draft.settings
    value, warmup = s["lr_scheduler"], s["lr_warmup_steps"] or 0
    if value in SCHEDULES:
        draft.put("stage.train.schedule", SCHEDULES[value], "lr_scheduler")
    else:
        near = "cosine" if "cos" in str(value) or value == "sine" else "linear"
        words = f"posttrain has constant, cosine and linear, which end at 0; {near} comes nearest to {value}"
        draft.near("stage.train.schedule", near, "lr_scheduler", words)
    if value == "constant" and warmup:
        draft.idle["lr_warmup_steps"] = "the schedule constant has no warm-up there; here it would have"
    elif warmup < steps:
        draft.put("stage.train.warmup_steps", warmup, "lr_warmup_steps")
    else:
        raise s.refused("lr_warmup_steps", f"the warm-up must be shorter than the {steps} steps")
