"""A Stable Diffusion 3 pipeline of a given configuration whose weights are nobody's.

Its weights are random, or, built under torch's FakeTensorMode, not there at all: what a plan or a benchmark
asks of a model depends on shapes alone. It has no tokenizer: a word's number is a hash of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Configs = Mapping[str, Mapping[str, Any]]
"""Component -> its configuration; see :data:`posttrain.models._published.PUBLISHED`."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Unpublished:
    """What :class:`posttrain.models.sd3.SD3FlowModel` needs of a pipeline."""

    def __init__(self, configs: Configs, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
        import torch
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        def clip(name: str) -> Any:
            encoder: Any = CLIPTextModelWithProjection(CLIPTextConfig(**configs[name]))
            return encoder.to(dtypes["default"])

        with torch.device(device):
            self.transformer: Any = SD3Transformer2DModel.from_config(dict(configs["transformer"]))
            self.transformer.to(dtypes["transformer"])
            self.vae: Any = AutoencoderKL.from_config(dict(configs["vae"]))
            self.text_encoder, self.text_encoder_2 = clip("text_encoder"), clip("text_encoder_2")
            self.text_encoder_3: Any = None
            if "text_encoder_3" in configs:
                t5: Any = T5EncoderModel(T5Config(**configs["text_encoder_3"]))
                self.text_encoder_3 = t5.to(dtypes["default"])
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(configs["scheduler"]))
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode_prompt(
        self, prompt: Sequence[str], *, device: torch.device, max_sequence_length: int, **_: Any
    ) -> tuple[Tensor, None, Tensor, None]:
        """Embeddings (n, tokens, width) and pooled ones (n, width), put together as diffusers does."""
        import torch

        clip = []
        for encoder in (self.text_encoder, self.text_encoder_2):
            config = encoder.config
            ids = _numbered(prompt, config.max_position_embeddings, config.eos_token_id, device)
            clip.append(encoder(ids, output_hidden_states=True))
        hidden = torch.cat([out.hidden_states[-2] for out in clip], -1)
        width = self.transformer.config.joint_attention_dim
        hidden = torch.nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
        if self.text_encoder_3 is None:
            t5 = hidden.new_zeros(len(prompt), max_sequence_length, width)
        else:
            t5 = self.text_encoder_3(_numbered(prompt, max_sequence_length, 1, device))[0]
        pooled = torch.cat([out.text_embeds for out in clip], -1)
        return torch.cat([hidden, t5], 1), None, pooled, None


def configs_at(path: str) -> Configs | None:
    """The configurations of the pipeline at ``path``, from this machine or as published; None if unknown."""
    from posttrain.models import _weights
    from posttrain.models._published import PUBLISHED

    names = ("transformer", "vae", *TEXT_ENCODERS)
    found = {name: config for name in names if (config := _weights.config(path, name)) is not None}
    if "transformer" not in found or "vae" not in found:
        return PUBLISHED.get(path)
    return {**found, "scheduler": _weights.config(path, "scheduler", "scheduler_config.json") or {}}


def _numbered(prompts: Sequence[str], length: int, end: int, device: torch.device) -> Tensor:
    """(n, length) token numbers, the ``end``'s after the words."""
    import torch

    rows = [
        [2 + zlib.crc32(word.encode()) % (end - 2 if end > 2 else 30) for word in p.split()] for p in prompts
    ]
    rows = [[*row[: length - 1], *[end] * (length - len(row[: length - 1]))] for row in rows]
    return torch.tensor(rows, device=device)
