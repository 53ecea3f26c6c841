"""A small flow model of pixels: no autoencoder, no text encoder, and weights that begin random."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from posttrain.condition import Condition
from posttrain.model import DtypeName, EncoderName, FlowModel, Model, torch_dtype

SIDE = 4
"""A latent is a square of so many pixels a side, so it has 3 x 4 x 4 channels."""
CHANNELS = 3 * SIDE**2
WORDS = 64
"""A prompt is the counts of its words in so many classes. Their order is not kept."""


class Block(nn.Module):
    """Mixes neighbours and channels, by what the prompt and sigma say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.neighbours = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.modulation = nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, None, None].chunk(2, dim=-1)
        mixed = self.neighbours(x).movedim(1, -1)
        mixed = nn.functional.layer_norm(mixed, mixed.shape[-1:]) * (1 + scale) + shift
        return x + self.second(nn.functional.gelu(self.first(mixed))).movedim(-1, 1)


class Network(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The velocity of squares of pixels (n, 48, h, w) at sigma (n,), for words (n, 64)."""

    @register_to_config
    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.words, self.noise = nn.Linear(WORDS, width), nn.Linear(3, width)
        self.enter, self.leave = nn.Conv2d(CHANNELS, width, 1), nn.Conv2d(width, CHANNELS, 1)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, latents: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        noise = torch.stack([sigma, sigma**2, (1 - sigma) ** 2], dim=1)
        condition = nn.functional.silu(self.words(words) + self.noise(noise))
        x = self.enter(latents)
        for layer in self.layers:
            x = layer(x, condition)
        return self.leave(x)


class PixelFlow(FlowModel):
    """A loaded network; its latents are the pixels themselves."""

    divisor = SIDE

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        counts = [[0.0] * WORDS for _ in prompts]
        for row, prompt in zip(counts, prompts, strict=True):
            for word in prompt.lower().split():
                row[zlib.crc32(word.encode()) % WORDS] += 1
        return {"words": torch.tensor(counts, device=self.device)}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = pixel_unshuffle(pixels.float(), SIDE)
        return mean, torch.full_like(mean, -30.0)  # no noise that a pixel would show

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return CHANNELS, height // SIDE, width // SIDE

    def decode(self, latents: Tensor) -> Tensor:
        return (pixel_shuffle(latents, SIDE) / 2 + 0.5).clamp(0, 1)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.forward_dtype or self.transformer.dtype
        return self.module(latents.to(dtype), sigma.to(dtype), condition["words"].to(dtype)).float()

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        return {"words": WORDS} if encoder == "prompts" else {"side": SIDE}


class Pixels(Model):
    """A flow model of small images in pixel space, trained from random weights."""

    type: Literal["pixels"] = "pixels"
    width: int = Field(default=64, ge=8, le=1024)
    """Channels of the network."""
    depth: int = Field(default=4, ge=1, le=64)
    """Blocks of the network. Each lets a square of pixels see two more squares in each direction."""
    seed: int = 0
    """Seed of the weights."""

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Network(self.width, self.depth)
        return PixelFlow(nn.Module.to(network, device, torch_dtype(transformer_dtype)), device)

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel:
        with device:
            return PixelFlow(Network(self.width, self.depth).type(torch_dtype(transformer_dtype)), device)

    def sides(self) -> tuple[int, int | None]:
        return SIDE, None
