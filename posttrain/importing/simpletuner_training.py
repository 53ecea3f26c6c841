"""SimpleTuner's options of optimizer, batch and checkpoints, as a recipe's ``train`` block."""

from __future__ import annotations

from posttrain.importing.diffusers_flags import put_training
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings

OPTIMIZERS = {
    **dict.fromkeys(("adamw_bf16", "adamw", "optimi-adamw", "bnb-adamw", "bnb-adamw-paged"), "adamw"),
    **dict.fromkeys(("adamw8bit", "ao-adamw8bit", "bnb-adamw8bit", "bnb-adamw8bit-paged"), "adamw8bit"),
}


def put_train(s: Settings, d: Draft, processes: int) -> None:
    """Write ``stage.train``. Raises PosttrainError."""
    counted = ["num_processes"] if "num_processes" in s else []
    batch = put_training(d, processes, *counted)
    _optimizer(s, d)
    _rate(s, d, batch)
    _clipping(s, d)
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


def _optimizer(s: Settings, d: Draft) -> None:
    if (name := str(s["optimizer"])) in OPTIMIZERS:
        d.put("stage.train.optimizer", OPTIMIZERS[name], "optimizer")
    else:
        words = "posttrain has AdamW, also with moments of 8 bits: another learning rate may suit it"
        d.near("stage.train.optimizer", "adamw", "optimizer", words)
    options = dict(part.split("=", 1) for part in str(s["optimizer_config"] or "").split(",") if "=" in part)
    if "weight_decay" in options:
        decay = s.number("optimizer_config", options.pop("weight_decay"))
        d.put("stage.train.weight_decay", decay, "optimizer_config")
        d.idle["adam_weight_decay"] = "optimizer_config says it"
    else:
        d.put("stage.train.weight_decay", s["adam_weight_decay"], "adam_weight_decay")
        d.idle["optimizer_config"] = "it is empty"
    if options:
        d.lost["optimizer_config"] = f"{', '.join(options)}: AdamW has betas, eps and weight_decay"
    betas = [f"adam_{b}" if s[f"optimizer_{b}"] is None else f"optimizer_{b}" for b in ("beta1", "beta2")]
    d.same({"stage.train.betas": betas})


def _rate(s: Settings, d: Draft, batch: int) -> None:
    d.idle |= dict.fromkeys(("lr_scale", "lr_scale_sqrt"), "off, as here")
    if not s["lr_scale"]:
        d.put("stage.train.learning_rate", s["learning_rate"], "learning_rate")
    elif s["lr_scale_sqrt"]:
        rate = s["learning_rate"] * batch**0.5
        d.put("stage.train.learning_rate", rate, "learning_rate", "lr_scale", "lr_scale_sqrt")
    else:
        d.put("stage.train.learning_rate", s["learning_rate"] * batch, "learning_rate", "lr_scale")


def _clipping(s: Settings, d: Draft) -> None:
    limit = s["max_grad_norm"]
    note = "" if limit else "0 is no clipping there"
    d.put("stage.train.max_grad_norm", limit or 1e6, "max_grad_norm", note=note)
    if s["grad_clip_method"] == "norm":
        d.idle["grad_clip_method"] = "by norm, as here"
        return
    words = "the norm of the gradient is clipped, for which 1.0 is usual; there each number of it by itself"
    d.lost["grad_clip_method"] = words
