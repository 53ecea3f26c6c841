"""A fresh Stable Diffusion 3 pipeline at the size of the Shapes world, to be pretrained by a recipe.

Transformer and text encoders are random; the text encoders stay so, since random embeddings of a small
closed vocabulary are as good as learned ones to a transformer that learns to read them. The autoencoder is
fitted to Shapes images here, because no algorithm can train in a latent space that does not exist yet.
"""

from __future__ import annotations

import json
import shutil
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from posttrain.errors import ModelError, TrainingError
from posttrain.model import DtypeName, EncoderName, FlowModel, Model
from posttrain.models._outline import configs_at
from posttrain.models.sd3 import SD3
from posttrain.weights.hugging_face import quiet

if TYPE_CHECKING:
    import torch

TOKENS = 16
"""Length of every prompt in tokens; the longest Shapes prompt has 12 words."""
LATENT_CHANNELS = 8
START, END = "<|startoftext|>", "<|endoftext|>"


class TinySD3(Model):
    """A random SD3 pipeline of about 3 M parameters whose autoencoder is fitted to Shapes images."""

    type: Literal["tiny_sd3"] = "tiny_sd3"
    seed: int = 0
    layers: int = Field(5, ge=1)
    heads: int = Field(4, ge=1)
    head_dim: int = Field(32, ge=4, multiple_of=4)
    autoencoder_steps: int = Field(1500, ge=1)
    autoencoder_images: int = Field(4000, ge=16)
    shift: float = Field(1.0, gt=0)
    """Of the timestep schedule; SD3's 3 suits images of 1024 px, not of 64."""

    def materialise(self, folder: Path) -> SD3:
        done, part = folder / "tiny-sd3", folder / "tiny-sd3.part"
        settings = json.dumps(self.model_dump(), indent=2)
        if not done.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            with quiet():
                _build(self, part, folder)
            (part / "tiny_sd3.json").write_text(settings)
            part.rename(done)
        elif (done / "tiny_sd3.json").read_text() != settings:
            raise ModelError(
                f"{str(done)!r} was made with other settings: remove it, or use another run name"
            )
        return SD3(path=str(done), max_sequence_length=TOKENS)

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        raise ModelError("a tiny_sd3 model is loaded after materialise(), as the SD3 folder that it makes")

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
        return cached  # as of the SD3 folder that it becomes

    def divisor(self) -> int | None:
        return 8


def _build(spec: TinySD3, folder: Path, work: Path) -> None:
    """Write the pipeline to ``folder``."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    from posttrain.shapes.scene import VOCABULARY

    torch.manual_seed(spec.seed)
    clip_tokenizer = _clip_tokenizer(list(VOCABULARY), work)
    t5_tokenizer = _t5_tokenizer(list(VOCABULARY))

    width = spec.heads * spec.head_dim
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=spec.layers,
        attention_head_dim=spec.head_dim,
        num_attention_heads=spec.heads,
        joint_attention_dim=96,
        caption_projection_dim=width,
        pooled_projection_dim=96,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=96, d_ff=96, d_kv=24, num_layers=1, num_heads=4)
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=spec.shift),
        vae=_fitted_autoencoder(spec, work),
        text_encoder=_clip(clip_tokenizer, 48, spec.seed),
        tokenizer=clip_tokenizer,
        text_encoder_2=_clip(clip_tokenizer, 48, spec.seed + 1),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5.half(),
        tokenizer_3=t5_tokenizer,
    )
    pipeline.save_pretrained(folder)


def _clip(tokenizer: Any, width: int, seed: int) -> Any:
    """A random CLIP text encoder whose features are of order 1 and tell words and places apart."""
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
        # the usual weights of 0.02 are made for training; here nothing will ever enlarge them
        for name, parameter in model.named_parameters():
            if name.endswith("token_embedding.weight"):
                parameter.normal_(std=1.0)
            elif name.endswith("position_embedding.weight"):
                parameter.normal_(std=0.5)
            elif name.endswith(("v_proj.weight", "out_proj.weight")):
                # attention is nearly uniform, so each token, and the pooled one most, gets the mean of the
                # words before it: strong enough beside its own embedding to be read
                torch.nn.init.orthogonal_(parameter, gain=4.0 if "v_proj" in name else 1.0)
    return model.half()


def _fitted_autoencoder(spec: TinySD3, work: Path) -> Any:
    """An AutoencoderKL of 0.6 M parameters fitted with L1 + 1e-4 KL, the KL a sum over channels and a mean
    over places; latents scaled to mean 0, std 1."""
    import torch
    from diffusers import AutoencoderKL

    from posttrain.data.loader import ImageSource
    from posttrain.data.settings import ShapesData

    data = ShapesData(images=spec.autoencoder_images, seed=spec.seed, style="web")
    source = ImageSource(data.materialise(work / "autoencoder-images"), divisor=8)
    vae: Any = AutoencoderKL(
        block_out_channels=(16, 32, 48, 48),  # type: ignore[arg-type] (diffusers' hints lack an ellipsis)
        down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    steps = spec.autoencoder_steps
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    batches = source.batches(16, ("autoencoder", spec.seed), 0)
    for step, batch in zip(range(steps), batches, strict=False):
        posterior = vae.encode(batch.pixels).latent_dist
        restored = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        loss = (restored - batch.pixels).abs().mean() + 1e-4 * posterior.kl().mean() / 64
        if not torch.isfinite(loss):
            raise TrainingError(f"the autoencoder's loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"autoencoder  {step}/{steps}  loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        pixels = torch.cat([next(batches).pixels for _ in range(32)])
        latents = vae.encode(pixels).latent_dist.mean
    vae.register_to_config(shift_factor=round(latents.mean().item(), 4))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae.half()


def _clip_tokenizer(words: list[str], work: Path) -> Any:
    """A CLIP tokenizer in the published format in which every word is one token."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for k in range(1, len(parts)):
            # a merge inside the rest of the word must not come before the one that grows its prefix
            merges.setdefault(("".join(parts[:k]), parts[k]), set())
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for k in range(1, len(parts)):
            grows = ("".join(parts[:k]), parts[k])
            for inner in zip(parts[k:], parts[k + 1 :], strict=False):
                if inner in merges:
                    merges[inner].add(grows)
    ordered = list(TopologicalSorter(merges).static_order())
    vocabulary = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in ordered), START, END]
    folder = work / "tokenizer.part"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(dict.fromkeys(vocabulary))})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ordered))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=END)
    shutil.rmtree(folder)
    for word in words:
        if len(ids := tokenizer(word).input_ids) != 3:
            raise ModelError(f"the word {word!r} became {len(ids) - 2} tokens, not one")
    return tokenizer


def _t5_tokenizer(words: list[str]) -> Any:
    """A T5 tokenizer in which every word is one piece."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(chr(c), -10.0) for c in range(ord("a"), ord("z") + 1)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5TokenizerFast(vocab=pieces, model_max_length=TOKENS, extra_ids=0)
