"""HY-SOAR's flags (github.com/Tencent-Hunyuan/HY-SOAR, train_soar_sd3_5m.py).

Names, defaults and meanings were read in the training script, as stored on 2026-11-27, and in the README at
0aec693.
"""

from __future__ import annotations

import re

from posttrain.errors import PosttrainError
from posttrain.importing.diffusers_flags import COMMON, put_head, put_training
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag, Settings
from posttrain.importing.models import put_model, put_precision
from posttrain.importing.trainer import Start, Trainer

WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap")
_SIZES = "HY-SOAR does not read it: images have the bw and bh of their row, as here without data.resolution"
_HUB = "posttrain export RUN --to DIR --push-to-hub REPO uploads what a stage wrote"

TABLE: dict[str, Flag] = {
    **COMMON,
    "variant": Flag(idle="posttrain finds the files of the weights itself"),
    "jsonl_path": Flag(),
    "image_dir": Flag(),
    "max_sequence_length": Flag("int", 77),
    "random_flip": Flag("bool", False),
    "output_dir": Flag(default="output/soar_sd3_5m"),
    "resolution": Flag("int", 512, idle=_SIZES),
    "max_train_steps": Flag("int"),
    "gradient_checkpointing": Flag("bool", False),
    "learning_rate": Flag("float", 2e-5),
    "scale_lr": Flag("bool", False),
    "lr_scheduler": Flag(default="constant"),
    "lr_num_cycles": Flag("int", 1, nearest="schedule: cosine has half a cycle", off=(1,)),
    "lr_power": Flag("float", 1.0, nearest="schedule: linear, which is of power 1", off=(1.0,)),
    "dataloader_num_workers": Flag("int", 8),
    "use_8bit_adam": Flag("bool", False),
    "adam_weight_decay": Flag("float", 1e-4),
    "max_grad_norm": Flag("float", 1.0),
    "allow_tf32": Flag("bool", False),
    "weighting_scheme": Flag(default="logit_normal", choices=WEIGHTINGS),
    "logit_mean": Flag("float", 0.0),
    "logit_std": Flag("float", 1.0),
    "mode_scale": Flag("float", 1.29),
    "lambda_aux": Flag("float", 1.0),
    "num_rollout_paths": Flag("int", 1),
    "trajectory_length": Flag("int", 6),
    "sde_rollout_type": Flag(default="flow_sde", choices=("simple", "sde", "flow_sde", "cps")),
    "sde_noise_scale": Flag("float", 0.5),
    "cfg_scale_sampling": Flag("float", 4.5),
    "num_sampling_steps": Flag("int", 40),
    "cond_dropout_rate": Flag("float", 0.0),
    "sigma_upper_ratio": Flag(
        "float", 1.5, idle="HY-SOAR takes it and does not use it: the upper sigma is always 1, as here"
    ),
    "checkpointing_steps": Flag("int", 500),
    "checkpoints_total_limit": Flag("int"),
    "resume_from_checkpoint": Flag(idle="the same command goes on with an unfinished run"),
    "logging_dir": Flag(idle="curves are in runs/NAME/STAGE"),
    "report_to": Flag(default="tensorboard"),
    "mixed_precision": Flag(choices=("no", "fp16", "bf16")),
    "push_to_hub": Flag("bool", False, idle=_HUB),
    "hub_token": Flag(idle=_HUB),
    "hub_model_id": Flag(idle=_HUB),
}
ALGORITHM = (
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "lambda_aux", "num_rollout_paths",
    "trajectory_length", "sde_rollout_type", "sde_noise_scale", "cfg_scale_sampling", "num_sampling_steps",
)  # fmt: skip
"""Flags that the algorithm ``soar`` has under the same name."""
SAME = {
    "tf32": "allow_tf32",
    "model.max_sequence_length": "max_sequence_length",
    "stage.algorithm.cond_dropout": "cond_dropout_rate",
    "stage.data.flip": "random_flip",
    "stage.data.workers": "dataloader_num_workers",
    "stage.train.weight_decay": "adam_weight_decay",
    "stage.train.max_grad_norm": "max_grad_norm",
    "stage.train.checkpoint_every": "checkpointing_steps",
}
DIFFERS = (
    "sigma(t) is the closed form, an auxiliary point's timestep exactly 1000 sigma; there both are rounded",
    "latents, sigmas and targets are float32; there bf16",
    "an auxiliary sigma is at least sigma_floor, 0.02; 0 is the published behaviour",
    "an image comes once in an epoch, for any number of processes; there 8 processes see about 65 % of them",
    "each sample has noise and a time of its own; there all processes draw the same ones",
    "an image that cannot be read is skipped and listed, and more than data.tolerance stops the run; there "
    "another or a black image takes its place",
    "the rollout keeps no graph, and each micro-batch is propagated back by itself: less memory, same sums",
    "the same command goes on with an unfinished run, to the same weights on the CPU; there resuming needs "
    "files that are never written",
)


def build(s: Settings, d: Draft, start: Start) -> None:
    """Write the recipe of the flags ``s``. Raises PosttrainError."""
    if start.processes is None:
        raise PosttrainError(
            "HY-SOAR counts --train_batch_size for each process: say how many there are with --processes N, "
            "or give the whole command, with torchrun's --nproc_per_node"
        )
    put_head(d, "hy-soar")
    put_model(d, "pretrained_model_name_or_path", "revision", "sd3")
    put_precision(d, "mixed_precision")
    d.put("stage.name", "soar")
    d.put("stage.tune.type", "full", note="HY-SOAR trains all weights")
    d.put("stage.algorithm.type", "soar")
    without_effect = _without_effect(s)
    d.idle |= without_effect
    d.same({f"stage.algorithm.{name}": name for name in ALGORITHM if name not in without_effect})
    d.same(SAME)
    if s["seed"] is not None:
        d.put("seed", s["seed"], "seed")
    if s["cond_dropout_rate"]:
        d.differs.append(
            "condition dropout is drawn for each sample, and the rollout keeps its prompt; there for a batch"
        )
    d.put("stage.algorithm.sigma_floor", 0.02, note="ours; 0 as published")
    d.put("stage.data.images", s.needed("jsonl_path"), "jsonl_path", note="rows of md5, caption_en, bw, bh")
    d.put("stage.data.image_dir", s.needed("image_dir"), "image_dir")
    _training(s, d, put_training(d, start.processes))
    d.differs += DIFFERS


def _without_effect(s: Settings) -> dict[str, str]:
    """The flags that do nothing beside the others, which a recipe refuses, each with the reason."""
    scheme, kind = s["weighting_scheme"], s["sde_rollout_type"]
    found = {}
    if scheme != "logit_normal":
        found |= dict.fromkeys(("logit_mean", "logit_std"), f"no effect with --weighting_scheme {scheme}")
    if scheme != "mode":
        found["mode_scale"] = f"no effect with --weighting_scheme {scheme}"
    if kind == "sde":
        found["sde_noise_scale"] = "no effect with --sde_rollout_type sde"
    if s["num_rollout_paths"] == 1:
        one = "no effect with one rollout path, which is the ODE's"
        found |= dict.fromkeys(("sde_rollout_type", "sde_noise_scale"), one)
    return found


def _training(s: Settings, d: Draft, batch: int) -> None:
    d.either("stage.train.optimizer", "use_8bit_adam", "adamw8bit", "adamw")
    d.same({"stage.train.betas": ("adam_beta1", "adam_beta2")})
    if s["scale_lr"]:
        d.put("stage.train.learning_rate", s["learning_rate"] * batch, "learning_rate", "scale_lr")
    else:
        d.put("stage.train.learning_rate", s["learning_rate"], "learning_rate")
        d.idle["scale_lr"] = "off, as here"
    if s["checkpoints_total_limit"] is None:
        d.differs.append(
            "the last two checkpoints stay, which here hold the optimizer too; there all: set keep_every"
        )
    else:
        d.put("stage.train.keep_checkpoints", s["checkpoints_total_limit"], "checkpoints_total_limit")


TRAINER = Trainer("HY-SOAR", "--", re.compile(r"\S*train_soar\w*(\.py)?(\s|$)"), TABLE, build)
