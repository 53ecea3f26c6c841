"""Makes a new Stable Diffusion 3 pipeline of the size that Shapes needs, for a recipe to pretrain.

The transformer and the text encoders are random. The text encoders stay random: the vocabulary is small and
closed, and a transformer learns to read random embeddings as well as learned ones. T5's heads are made to
read the neighbours of a word, so that its features at "circle" tell the colour and the relation beside it.
The autoencoder is fitted to Shapes images here, because training needs a latent space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.model import DtypeName, EncoderName, FlowModel, Model
from posttrain.models._outline import configs_at
from posttrain.models._tiny_tokenizers import clip_tokenizer, t5_tokenizer
from posttrain.models.sd3 import SD3
from posttrain.support.files import published
from posttrain.support.records import read_object
from posttrain.weights.hugging_face import quiet

if TYPE_CHECKING:
    import torch

TOKENS = 16
"""Tokens of every prompt. The longest Shapes prompt has 12 words."""
LATENT_CHANNELS = 8
LATENTS = 8
"""Latents of a side of the images that it is made for, of 8 pixels each."""
POSITIONS = 16
"""Latents of an image's side, of 8 pixels each, that the transformer has positions for."""
SETTINGS = "tiny_sd3.json"
"""The file that says with which settings a pipeline was made."""


class TinySD3(Model):
    """A random SD3 pipeline of about 3 M parameters whose autoencoder is fitted to Shapes images."""

    type: Literal["tiny_sd3"] = "tiny_sd3"
    seed: int = 0
    """Seed of all weights and of the autoencoder's images."""
    layers: int = Field(default=5, ge=1, le=64)
    """Blocks of the transformer."""
    heads: int = Field(default=4, ge=1, le=64)
    """Attention heads of a block. The transformer is ``heads`` * ``head_dim`` wide."""
    head_dim: int = Field(default=32, ge=4, le=256, multiple_of=4)
    """Width of an attention head, a multiple of 4."""
    autoencoder_steps: int = Field(default=1500, ge=1)
    """Optimizer steps that fit the autoencoder."""
    autoencoder_images: int = Field(default=4000, ge=16, le=1_000_000)
    """Shapes images that are rendered to fit the autoencoder."""
    shift: float = Field(default=1.0, gt=0)
    """Shift of the timesteps. SD3's 3 suits images of 1024 px, not of 64 px."""

    def build(self, folder: Path, device: torch.device) -> SD3:
        done, settings = folder / "tiny-sd3", json.dumps(self.model_dump(), indent=2)
        if not done.is_dir() or read_object(done / SETTINGS) != self.model_dump():
            import torch

            with published(done) as unfinished, quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                _build(self, unfinished, folder, device)
                (unfinished / SETTINGS).write_text(settings, "utf-8")
        return SD3(path=str(done), max_sequence_length=TOKENS)

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        raise ModelError(
            "a tiny_sd3 model has no weights yet: call build() and load the SD3 model that it returns"
        )

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel | None:
        if (shipped := configs_at("posttrain/tiny-sd3")) is None:
            return None
        own = {
            "num_layers": self.layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "caption_projection_dim": self.heads * self.head_dim,
        }
        configs = {**shipped, "transformer": {**shipped["transformer"], **own}}
        made = SD3(path="tiny-sd3", max_sequence_length=TOKENS)
        return made.outline_of(configs, transformer_dtype, device)

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        return cached  # as for the SD3 model that it becomes

    def native_side(self) -> int:
        return 8 * LATENTS

    def sides(self) -> tuple[int, int | None]:
        return 8, 8 * POSITIONS


def _build(spec: TinySD3, folder: Path, work: Path, device: torch.device) -> None:
    """Write the pipeline to ``folder``, and the autoencoder's training images below ``work``.

    The autoencoder is fitted on ``device``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from posttrain.data.image_data import ShapesData
    from posttrain.data.loader import ImageSource
    from posttrain.models._tiny_autoencoder import fitted_autoencoder
    from posttrain.shapes.scene import VOCABULARY

    clip_words, t5_words = (make(VOCABULARY, TOKENS) for make in (clip_tokenizer, t5_tokenizer))
    width = spec.heads * spec.head_dim
    transformer = SD3Transformer2DModel(
        sample_size=LATENTS,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=spec.layers,
        attention_head_dim=spec.head_dim,
        num_attention_heads=spec.heads,
        joint_attention_dim=96,
        caption_projection_dim=width,
        pooled_projection_dim=96,
        pos_embed_max_size=POSITIONS,
        qk_norm="rms_norm",
    )
    data = ShapesData(images=spec.autoencoder_images, seed=spec.seed, style="web")
    images = ImageSource(data.build(work / "autoencoder-images"), divisor=8)
    vae = fitted_autoencoder(LATENT_CHANNELS, images, spec.autoencoder_steps, spec.seed, device)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=spec.shift),
        vae=vae,
        text_encoder=_clip(clip_words, 48, spec.seed),
        tokenizer=clip_words,
        text_encoder_2=_clip(clip_words, 48, spec.seed + 1),
        tokenizer_2=clip_words,
        text_encoder_3=_t5(len(t5_words), spec.seed + 2),
        tokenizer_3=t5_words,
    )
    pipeline.save_pretrained(folder)


def _clip(tokenizer: Any, width: int, seed: int) -> Any:
    """A random CLIP text encoder whose features are of order 1 and tell words and positions apart."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CLIPTextModelWithProjection(config)
        # the usual standard deviation of 0.02 counts on training to enlarge the weights
        for name, parameter in model.named_parameters():
            if name.endswith("token_embedding.weight"):
                parameter.normal_(std=1.0)
            elif name.endswith("position_embedding.weight"):
                parameter.normal_(std=0.5)
            elif name.endswith(("v_proj.weight", "out_proj.weight")):
                # attention is nearly uniform, so each token gets the mean of the words before it; the gain
                # makes that mean strong enough beside the token's own embedding
                torch.nn.init.orthogonal_(parameter, gain=4.0 if "v_proj" in name else 1.0)
    return model.half()


def _t5(words: int, seed: int) -> Any:
    """A random T5 encoder. Each of its four heads reads one neighbour of a word, at most two words away."""
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=words, d_model=96, d_ff=96, d_kv=24, num_layers=2, num_heads=4)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = T5EncoderModel(config)
        # the bias of small offsets has a row for each: n for n words before, 16 + n for n words after
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        for head, offset in enumerate((2, 1, 16 + 1, 16 + 2)):
            bias[offset, head] = 12.0
        for block in model.encoder.block:
            attention = block.layer[0].SelfAttention
            for linear in (attention.v, attention.o):
                torch.nn.init.orthogonal_(linear.weight)
    return model.half()
