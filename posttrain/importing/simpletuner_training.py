"""SimpleTuner's options of optimizer, batch and checkpoints, as a recipe's ``train`` block."""

from __future__ import annotations

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.models import put_schedule


def put_training(s: Settings, d: Draft, processes: int) -> None:
    """Write ``stage.train``. Raises PosttrainError."""
    steps = s["max_train_steps"]
    if not steps:
        raise PosttrainError(
            "posttrain counts steps, not epochs: give --max_train_steps, which is epochs x "
            "images / batch size"
        )
    d.idle["num_train_epochs"] = "max_train_steps says how long it trains"
    d.put("stage.train.steps", steps, "max_train_steps")
    each, accumulated = s["train_batch_size"], s["gradient_accumulation_steps"]
    total = each * accumulated * processes
    names = ("train_batch_size", "gradient_accumulation_steps", "num_processes", "num_machines")
    given = [n for n in names if n in s] or ["train_batch_size"]
    d.put("stage.train.batch_size", total, *given, note=f"{each} x {accumulated} x {processes} processes")
    d.put("stage.train.micro_batch", "auto", note="ours: changes rounding only")
    _optimizer(s, d, total)
    put_schedule(d, "lr_scheduler", "lr_warmup_steps", steps)
    checkpointing = "full" if s["gradient_checkpointing"] else "off"
    d.put("stage.train.gradient_checkpointing", checkpointing, "gradient_checkpointing")
    d.put("stage.train.compile", str(s["dynamo_backend"]).lower() not in ("no", "none"), "dynamo_backend")
    if s["use_ema"]:
        d.put("stage.train.ema", s["ema_decay"], "use_ema", "ema_decay")
    else:
        d.idle["use_ema"] = d.idle["ema_decay"] = "off, as here"
    every = "checkpointing_steps" if "checkpointing_steps" in s else "checkpoint_step_interval"
    d.put("stage.train.checkpoint_every", s[every], every)
    if s["checkpoints_total_limit"]:
        d.put("stage.train.keep_checkpoints", s["checkpoints_total_limit"], "checkpoints_total_limit")
    else:
        d.lost["checkpoints_total_limit"] = "0 keeps all there: set keep_every"
    shown = "validation_steps" if "validation_steps" in s else "validation_step_interval"
    if s[shown]:
        d.put("stage.train.sample_every", s[shown], shown, note="grids of captions, or of evaluation.prompts")


def _optimizer(s: Settings, d: Draft, total: int) -> None:
    name = str(s["optimizer"])
    if name in ("adamw_bf16", "adamw", "optimi-adamw", "bnb-adamw", "bnb-adamw-paged"):
        d.put("stage.train.optimizer", "adamw", "optimizer")
    elif name in ("bnb-adamw8bit", "bnb-adamw8bit-paged", "ao-adamw8bit", "adamw8bit"):
        d.put("stage.train.optimizer", "adamw8bit", "optimizer")
    else:
        d.near(
            "stage.train.optimizer",
            "adamw",
            "optimizer",
            "posttrain has AdamW, also with moments of 8 bits: another learning rate may suit it",
        )
    factor = total**0.5 if s["lr_scale_sqrt"] else total
    scaled = ["lr_scale", *(["lr_scale_sqrt"] if s["lr_scale_sqrt"] else [])] if s["lr_scale"] else []
    rate = s["learning_rate"] * (factor if s["lr_scale"] else 1)
    d.put("stage.train.learning_rate", rate, "learning_rate", *scaled)
    for flag in ("lr_scale", "lr_scale_sqrt"):
        d.idle[flag] = "off, as here"
    options = dict(part.split("=", 1) for part in str(s["optimizer_config"] or "").split(",") if "=" in part)
    decay = options.pop("weight_decay", None)
    flag = "adam_weight_decay" if decay is None else "optimizer_config"
    try:
        value = s["adam_weight_decay"] if decay is None else float(decay)
    except ValueError:
        raise s.refused("optimizer_config", "weight_decay is no number") from None
    d.put("stage.train.weight_decay", value, flag)
    if options:
        d.lost["optimizer_config"] = f"{', '.join(options)}: AdamW has betas, eps and weight_decay"
    elif decay is None:
        d.idle["optimizer_config"] = "it is empty"
    betas = ["adam_beta1" if s["optimizer_beta1"] is None else "optimizer_beta1",
             "adam_beta2" if s["optimizer_beta2"] is None else "optimizer_beta2"]  # fmt: skip
    d.put("stage.train.betas", [s[b] for b in betas], *betas)
    d.put("stage.train.eps", s["adam_epsilon"], "adam_epsilon")
    _clipping(s, d)


def _clipping(s: Settings, d: Draft) -> None:
    limit = s["max_grad_norm"]
    d.put(
        "stage.train.max_grad_norm",
        limit or 1e6,
        "max_grad_norm",
        note="" if limit else "0 is no clipping there",
    )
    if s["grad_clip_method"] == "norm":
        d.idle["grad_clip_method"] = "by norm, as here"
        return
    words = "the gradient's norm is clipped, with 1.0 as usual; there each number of the gradient by itself"
    d.lost["grad_clip_method"] = words
    if "grad_clip_method" not in s:
        d.differs.append(f"grad_clip_method is value there by default: here {words}")
