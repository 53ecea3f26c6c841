"""Flow-GRPO's configurations (github.com/yifan123/flow_grpo, config/base.py and config/grpo.py).

Names, defaults and meanings were read there at 31c71b9 and 54809b5, on 2026-11-27.
"""

from __future__ import annotations

import re

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag, Settings
from posttrain.importing.group_rl import COMMON, SEEDED, put_common
from posttrain.importing.published import FLOW_GRPO
from posttrain.importing.trainer import Start, Trainer

WINDOWED = re.compile(r"fast|qwenimage", re.I)
"""Training scripts that read ``sde_window_size``."""
VIDEO = "images only"

TABLE: dict[str, Flag] = {
    **COMMON,
    "save_freq": Flag("int", 20, least=1),
    "eval_freq": Flag("int", 20, least=1),
    "num_checkpoint_limit": Flag("int", 5),
    "activation_checkpointing": Flag("bool", False),
    "fsdp_optimizer_offload": Flag("bool", False, nearest="parallel: {strategy: fsdp2, offload: true}"),
    "sample.eval_guidance_scale": Flag("float", 4.5),
    "sample.noise_level": Flag("float", 0.7),
    "sample.same_latent": Flag("bool", False),
    "sample.sde_type": Flag(default="sde", choices=("sde", "cps")),
    "sample.sde_window_size": Flag("int", 2),
    "sample.sde_window_range": Flag("list", [0, 10]),
    "sample.batch_size": Flag("int", idle="no training script of it reads it"),
    "sample.train_num_steps": Flag(
        "int", nearest="sample.sde_window_size, as Flow-GRPO-Fast has since October 2025"
    ),
    "sample.mini_num_image_per_prompt": Flag("int", nearest="micro_batch, which bounds memory"),
    "sample.kl_reward": Flag("float", 0.0, nearest="beta, the KL's weight in the loss"),
    "sample.sample_time_per_prompt": Flag("int", 1, nearest="group_size", off=(1,)),
    "train.use_8bit_adam": Flag("bool", False),
    "train.cfg": Flag("bool", True),
    "train.clip_range": Flag("float", 1e-4),
    "train.clip_range_lt": Flag("float", 1e-4, nearest="clip_range, which is symmetric", off=(1e-4,)),
    "train.clip_range_gt": Flag("float", 1e-4, nearest="clip_range, which is symmetric", off=(1e-4,)),
    "train.timestep_shift": Flag("float", 3.0, idle="it is Bagel's"),
    "train.timestep_fraction": Flag("float", 1.0),
    "train.beta": Flag("float", 0.0),
    "train.ema": Flag("bool", False),
    "train.sft": Flag("float", 0.0, nearest="a stage of type sft before this one"),
    "train.sft_batch_size": Flag("int", idle="train.sft is what switches it on"),
    "height": Flag("int", nearest=VIDEO),
    "width": Flag("int", nearest=VIDEO),
    "frames": Flag("int", nearest=VIDEO),
    "diffusion_loss": Flag("bool", nearest=VIDEO),
}
SAME = {
    "stage.algorithm.noise_level": "sample.noise_level",
    "stage.algorithm.init_same_noise": "sample.same_latent",
    "stage.algorithm.clip_range": "train.clip_range",
    "stage.algorithm.beta": "train.beta",
    "stage.train.keep_checkpoints": "num_checkpoint_limit",
}
DIFFERS = (
    "a prompt's samples are grouped by the row of the prompt file, not by the decoded text",
    "the EMA moves once for each optimizer step; there it moves after every micro-step of each eighth step",
    SEEDED,
    "rollout and training use the same numbers in float32 outside the network; the ratio before the first "
    "update is checked to be 1",
    "evaluation has fixed noise for each prompt and counts each sample once",
)


def build(s: Settings, d: Draft, start: Start) -> None:
    """Write the recipe of the configuration ``s``. Raises PosttrainError."""
    put_common(d, start, "grpo", "sample.eval_guidance_scale")
    d.put("stage.algorithm.type", "flow_grpo")
    d.same(SAME)
    sde = {"sde": "flow_sde", "cps": "cps"}[s["sample.sde_type"] or "sde"]
    d.put("stage.algorithm.sde_type", sde, "sample.sde_type")
    if s["train.cfg"] or s["sample.guidance_scale"] == 1:
        d.idle["train.cfg"] = "rollout and training have the same guidance"
    else:
        d.lost["train.cfg"] = "training has the rollout's guidance here: without it set guidance_scale to 1"
    _window(s, d, start.script)
    if "guard" in start.script.lower():
        d.put("stage.algorithm.grpo_guard", True, note=f"the script {start.script.rsplit('/', 1)[-1]}")
    d.either("stage.train.optimizer", "train.use_8bit_adam", "adamw8bit", "adamw")
    d.either("stage.train.gradient_checkpointing", "activation_checkpointing", "full", "off")
    d.differs += DIFFERS


def _window(s: Settings, d: Draft, script: str) -> None:
    """Write which steps are stochastic and trained: a window, or all but the last."""
    size, steps = "sample.sde_window_size", s["sample.num_steps"]
    reads = bool(WINDOWED.search(script)) if script else size in s
    if reads and s[size]:
        edges = s["sample.sde_window_range"] or [0, steps - 1]
        if len(edges) != 2 or not all(isinstance(edge, int) for edge in edges):
            raise s.refused("sample.sde_window_range", "two whole numbers")
        first, end = edges
        end = min(end, steps - 1)
        d.put("stage.algorithm.sde_window_size", s[size], size)
        d.put("stage.algorithm.sde_window_range", [first, end], "sample.sde_window_range")
        d.idle["train.timestep_fraction"] = "the window says which steps are trained"
        d.differs.append("the window is drawn once for each batch; there for each process and rollout")
        return
    fraction = s["train.timestep_fraction"]
    if not 0 < fraction <= 1:
        raise s.refused("train.timestep_fraction", "a number above 0, 1 at most")
    if int(steps * fraction) > steps - 1:
        words = "the last step, to sigma 0, is never trained here: its density is too narrow"
        d.near("stage.algorithm.timestep_fraction", 0.99, "train.timestep_fraction", words)
    else:
        d.put("stage.algorithm.timestep_fraction", fraction, "train.timestep_fraction")
    for flag in (size, "sample.sde_window_range"):
        d.idle[flag] = "off" if reads else "the script for all steps does not read it"


TRAINER = Trainer(
    "flow_grpo",
    "config.",
    re.compile(r"\S*train_(sd3|flux|qwenimage|wan|bagel)\w*\.py(\s|$)"),
    TABLE,
    build,
    published=FLOW_GRPO,
)
