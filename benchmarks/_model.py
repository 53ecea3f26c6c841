"""Makes the benchmarks' models, without anybody's weights, and counts the FLOPs of their forward.

``--model tiny`` is the shape of the shipped posttrain/tiny-sd3, for a CPU; ``--model sd35m`` is that of
Stable Diffusion 3.5 Medium. Its text encoders are tiny by default, since T5-XXL alone fills 10 GB;
``--text-encoders true`` makes them as published.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._outline import configs_at
from posttrain.models._published import PUBLISHED
from posttrain.models.sd3 import SD3
from posttrain.planning.counts import META
from posttrain.planning.footprint import flops

if TYPE_CHECKING:
    from _bench import Bench


def model_of(
    options: argparse.Namespace, tokens: int, device: torch.device, frozen: bool = False
) -> DiffusersFlowModel:
    """The model of ``--model`` with new random weights on ``device``; ``frozen`` ones have its precision."""
    tiny = configs_at("posttrain/tiny-sd3")
    assert tiny is not None, "it comes with the package"
    configs = dict(tiny)
    if options.model == "sd35m":
        configs = dict(PUBLISHED["stabilityai/stable-diffusion-3.5-medium"])
        if options.text_encoders == "tiny":
            transformer = configs["transformer"]
            clip = [{**tiny["text_encoder"], "max_position_embeddings": 77} for _ in range(2)]
            sizes = [768, transformer["pooled_projection_dim"] - 768]
            for name, config, size in zip(("text_encoder", "text_encoder_2"), clip, sizes, strict=True):
                configs[name] = {
                    **config,
                    "projection_dim": size,
                    "hidden_size": 768 if size == 768 else 1280,
                }
                configs[name]["num_attention_heads"] = 4
            configs["text_encoder_3"] = {
                **tiny["text_encoder_3"],
                "d_model": transformer["joint_attention_dim"],
            }
    dtype = "bf16" if options.precision == "bf16" else "fp32"
    spec = SD3(path=options.model, max_sequence_length=tokens, dtype=dtype)
    made = spec.outline_of(configs, dtype if frozen else "fp32", device)
    assert made is not None, "every component has a configuration"
    return made


def forward_flops(it: Bench) -> int:
    """FLOPs of one forward of one sample, counted."""
    tokens = it.model.spec.max_sequence_length  # type: ignore[attr-defined]
    model = model_of(it.options, tokens, META)
    with torch.no_grad():
        condition = model.encode_prompts(["a"])
    side = it.options.resolution
    latents = torch.empty(1, *model.latent_shape(side, side), device=META)
    return flops(lambda: model.velocity(latents, torch.empty(1, device=META), condition), model.transformer)
