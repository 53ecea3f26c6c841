"""Defines FLUX.2 klein in diffusers' folder format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, UNGUIDED, ClassifierFree
from posttrain.models._chat import chats
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_output, check_rope, check_settings, check_widths
from posttrain.models._flux2_layout import FLUX2
from posttrain.models._outline import PIPELINE, configs_at
from posttrain.models._packing import grid_ids, packed, unpacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.weights.single_file import SingleFile

LAYERS = (9, 18, 27)
"""The layers of the text encoder whose hidden states, one after the other, are a token's embedding."""
KNOWN = {"patch_size": 1, "guidance_embeds": False}
"""The transformer's settings that would need other inputs if they were different."""


class Flux2KleinFlowModel(DiffusersFlowModel):
    """A loaded FLUX.2 klein pipeline."""

    spec: Flux2Klein
    gives_times = True

    def __init__(self, spec: Flux2Klein, pipeline: Any, source: Path, device: torch.device) -> None:
        super().__init__(spec, pipeline, source, device)
        self.guidance_rule = _rule(pipeline.config)

    def encode(self, prompts: list[str]) -> Condition:
        import torch

        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder.model
        longest = self.spec.max_sequence_length
        tokens = tokenizer(
            chats(tokenizer, prompts, thinking=False),
            padding="max_length",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        known = tokens.attention_mask.to(self.device).bool()
        # given the words alone, transformers would choose other kernels where no prompt of a batch is padded
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        output = encoder(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=causal & known[:, None, None],
            output_hidden_states=True,
            use_cache=False,
        )
        states = [output.hidden_states[layer] for layer in LAYERS]
        return {"encoder_hidden_states": torch.cat(states, dim=-1)}

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        import torch
        from torch.nn.functional import pad

        dtype = self.forward_dtype or self.transformer.dtype
        embeds, (height, width) = condition["encoder_hidden_states"], latents.shape[-2:]
        # four axes: time, row and column of an image's token, and the place of a text's token
        places = torch.arange(embeds.shape[1], device=latents.device)[:, None]
        tokens = self.module(
            hidden_states=packed(latents).to(dtype),
            timestep=sigma,
            encoder_hidden_states=embeds.to(dtype),
            txt_ids=pad(places, (3, 0)),
            img_ids=pad(grid_ids(height // 2, width // 2, latents.device), (0, 1)),
            return_dict=False,
        )[0]
        return unpacked(tokens.float(), height, width)

    def mu(self, tokens: int) -> float:
        return self.grid_mu(tokens, self.spec.grid_steps)

    def grid_mu(self, tokens: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (c, h, w) of each number of ``latents`` (n, c, h, w), from the batch
        norm of the autoencoder. It has a channel for each number of a token, a square of 2 x 2 latents."""
        norm, (height, width) = self.vae.bn, latents.shape[-2:]
        found = []
        for each in (norm.running_mean, (norm.running_var + self.vae.config.batch_norm_eps).sqrt()):
            square = each.to(latents).reshape(-1, 2, 2)
            found.append(square.repeat(1, height // 2, width // 2))
        return found[0], found[1]

    def check(self) -> None:
        config, text = self.transformer.config, self.pipeline.text_encoder.config
        check_settings("transformer", config, KNOWN, "FLUX.2 klein has")
        check_rope(config, "axes_dims_rope")
        check_output(config)
        if (layers := text.num_hidden_layers) < max(LAYERS):
            raise ModelError(
                f"text_encoder does not fit: it has {layers} layers; the hidden states after layers "
                f"{', '.join(map(str, LAYERS))} are needed"
            )
        width, channels = len(LAYERS) * text.hidden_size, 4 * self.vae.config.latent_channels
        check_widths(
            config,
            ("text_encoder", "3 times its width is", width, "joint_attention_dim"),
            ("vae", "4 times its latent channels are", channels, "in_channels"),
        )


class Flux2Klein(DiffusersModel):
    """A FLUX.2 klein pipeline, 4B or 9B: base, or distilled to few steps without guidance."""

    type: Literal["flux2_klein"] = "flux2_klein"
    pipelines: ClassVar = ("Flux2KleinPipeline",)
    flow: ClassVar = Flux2KleinFlowModel
    packing: ClassVar = 2
    unencoded: ClassVar = frozenset({"grid_steps"})

    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Tokens of a prompt, in training and evaluation. Padding counts as tokens, as in diffusers."""
    grid_steps: int = Field(default=50, ge=1, le=10_000)
    """Training draws its noise levels by the grid of so many sampling steps. klein's shift depends on the
    number of steps, not on the image's size alone, and a loss has no such number. 50 is diffusers' default
    for base; distilled models are sampled in 4. Sampling always has the shift of its own number."""

    def single_file(self) -> SingleFile:
        return FLUX2

    def guidance_rule(self) -> ClassifierFree:
        return _rule((configs_at(self.path, self.revision) or {}).get(PIPELINE, {}))


def _rule(config: Mapping[str, Any]) -> ClassifierFree:
    """How a guidance scale acts, by the pipeline's own configuration."""
    return UNGUIDED if config.get("is_distilled") else CLASSIFIER_FREE
