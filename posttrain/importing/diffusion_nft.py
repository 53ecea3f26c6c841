"""DiffusionNFT's configurations (github.com/NVlabs/DiffusionNFT, config/base.py and config/nft.py).

Names, defaults and meanings were read on 2026-11-27 in copies of these files, in
github.com/jiaxi98/DiffusionNFT (a8c3e0c, a2f7a2b) and github.com/pkuhxy/DiffusionNFT (619456a).
"""

from __future__ import annotations

import re

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag, Settings
from posttrain.importing.group_rl import (
    COMMON,
    put_geometry,
    put_optimizer,
    put_prompts_and_rewards,
    put_steps,
    put_tuning,
    recipe_name,
)
from posttrain.importing.models import put_model, put_precision

NAME, PREFIX = "diffusion-nft", "config."
SCRIPTS = re.compile(r"train_nft\w*\.py$")
SOLVERS = {"dpm2": "dpm2", "dpm1": "dpm1", "flow": "euler", "ddim": "euler"}
ADVANTAGES = ("all", "positive_only", "negative_only", "one_only", "binary")

TABLE: dict[str, Flag] = {
    **COMMON,
    "save_freq": Flag("int", 30),
    "eval_freq": Flag("int", 10),
    "mixed_precision": Flag(default="fp16", choices=("fp16", "bf16", "no")),
    "base_model": Flag(idle="the model is that of pretrained.model"),
    "beta": Flag("float", 1.0),
    "decay_type": Flag("int", 1),
    "sample.noise_level": Flag("float", 1.0, idle="its sampler is deterministic"),
    "sample.solver": Flag(default="dpm2", choices=tuple(SOLVERS)),
    "sample.deterministic": Flag(
        "bool",
        True,
        nearest="solver: the rollout is deterministic, and no step of it is trained",
        off=(True,),
    ),
    "train.adv_mode": Flag(default="all", choices=ADVANTAGES),
    "train.beta": Flag("float", 1e-4),
    "train.timestep_fraction": Flag("float", 0.99),
    "train.ema": Flag("bool", True),
}
DIFFERS = (
    "sampling and training give the transformer exactly 1000 sigma; there the sampler's times "
    "are cut to whole numbers",
    "the KL's squared distance is computed in float32; there in fp16, where small ones become 0",
    "the logged policy_loss does not contain the KL",
    "a stage goes on from raw weights, old policy, EMA and optimizer; there from the EMA, with "
    "a new optimizer",
    "the old policy's decay counts optimizer steps, as there",
    "evaluation has fixed noise for each prompt and counts each sample once",
)


def build(s: Settings, d: Draft, script: str, processes: int | None) -> None:
    """Write the recipe of the configuration ``s``. Raises PosttrainError."""
    del script
    d.put("name", recipe_name(s, "diffusion-nft"), "run_name" if s["run_name"] else "save_dir")
    if s["run_name"]:
        d.idle["save_dir"] = "a run writes to runs/NAME"
    d.put("seed", s["seed"], "seed")
    d.put("tf32", s["allow_tf32"], "allow_tf32")
    kind = put_model(d, "pretrained.model", "pretrained.revision")
    d.put("stage.name", "nft")
    put_tuning(d)
    _algorithm(s, d)
    put_prompts_and_rewards(d)
    per_batch = put_geometry(d, processes, parts=True)
    put_steps(d, per_batch)
    put_optimizer(d)
    put_precision(d, "mixed_precision")
    if kind == "sd3":
        d.put("model.max_sequence_length", 128, note="as its training script has")
    d.put("stage.train.micro_batch", "auto", note="ours: changes rounding only")
    d.put("stage.train.gradient_checkpointing", "auto", note="ours: changes memory and speed only")
    if s["train.ema"]:
        d.put("stage.train.ema", 0.9, "train.ema", note="its greatest decay")
    else:
        d.idle["train.ema"] = "off, as here"
    d.put("evaluation.steps", s["sample.eval_num_steps"], "sample.eval_num_steps")
    d.put("evaluation.guidance", s["sample.guidance_scale"], "sample.guidance_scale")
    d.put("evaluation.batch_size", s["sample.test_batch_size"], "sample.test_batch_size")
    d.put("evaluation.precision", "fp32" if s["mixed_precision"] == "no" else "bf16", "mixed_precision")
    d.differs += DIFFERS


def _algorithm(s: Settings, d: Draft) -> None:
    d.put("stage.algorithm.type", "diffusion_nft")
    d.put("stage.algorithm.group_size", s["sample.num_image_per_prompt"], "sample.num_image_per_prompt")
    d.put("stage.algorithm.num_steps", s["sample.num_steps"], "sample.num_steps")
    d.put("stage.algorithm.solver", SOLVERS[s["sample.solver"]], "sample.solver")
    scale = s["sample.guidance_scale"]
    d.put("stage.algorithm.guidance_scale", scale, "sample.guidance_scale")
    if scale != 1:
        d.differs.append(
            "guidance in the rollout: training has none, so the samples are not those of the "
            "trained velocity; "
            "there it ends in an error of shapes"
        )
    d.put("stage.algorithm.beta", s["beta"], "beta")
    d.put("stage.algorithm.kl_weight", s["train.beta"], "train.beta")
    d.put("stage.algorithm.adv_mode", s["train.adv_mode"], "train.adv_mode")
    d.put("stage.algorithm.decay_type", s["decay_type"], "decay_type")
    d.put("stage.algorithm.timestep_fraction", s["train.timestep_fraction"], "train.timestep_fraction")
    d.put("stage.algorithm.global_std", s["sample.global_std"], "sample.global_std")
    d.put("stage.algorithm.adv_clip_max", s["train.adv_clip_max"], "train.adv_clip_max")
