"""DiffusionNFT's configurations (github.com/NVlabs/DiffusionNFT, config/base.py and config/nft.py).

Names, defaults and meanings were read on 2026-11-27 in copies of these files, in
github.com/jiaxi98/DiffusionNFT (a8c3e0c, a2f7a2b) and github.com/pkuhxy/DiffusionNFT (619456a).
"""

from __future__ import annotations

import re

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag, Settings
from posttrain.importing.group_rl import COMMON, put_common
from posttrain.importing.published import DIFFUSION_NFT
from posttrain.importing.trainer import Start, Trainer

SOLVERS = {"dpm2": "dpm2", "dpm1": "dpm1", "flow": "euler", "ddim": "euler"}
ADVANTAGES = ("all", "positive_only", "negative_only", "one_only", "binary")

TABLE: dict[str, Flag] = {
    **COMMON,
    "save_freq": Flag("int", 30, least=1),
    "eval_freq": Flag("int", 10, least=1),
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
SAME = {
    "stage.algorithm.beta": "beta",
    "stage.algorithm.kl_weight": "train.beta",
    "stage.algorithm.adv_mode": "train.adv_mode",
    "stage.algorithm.decay_type": "decay_type",
    "stage.algorithm.timestep_fraction": "train.timestep_fraction",
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


def build(s: Settings, d: Draft, start: Start) -> None:
    """Write the recipe of the configuration ``s``. Raises PosttrainError."""
    put_common(d, start, "nft", "sample.guidance_scale", parts=True)
    d.put("stage.algorithm.type", "diffusion_nft")
    d.same(SAME)
    d.put("stage.algorithm.solver", SOLVERS[s["sample.solver"]], "sample.solver")
    if s["sample.guidance_scale"] != 1:
        d.differs.append(
            "guidance in the rollout: training has none, so the samples are not those of the trained "
            "velocity; there it ends in an error of shapes"
        )
    d.put("stage.train.gradient_checkpointing", "auto", note="ours: changes memory and speed only")
    d.differs += DIFFERS


TRAINER = Trainer(
    "DiffusionNFT", "config.", re.compile(r"\S*train_nft\w*\.py(\s|$)"), TABLE, build, published=DIFFUSION_NFT
)
