"""Fits a small autoencoder to Shapes images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.data.loader import ImageSource
from posttrain.errors import TrainingError

BATCH, LEARNING_RATE, KL_WEIGHT = 16, 2e-3, 1e-4


def fitted_autoencoder(
    channels: int, images: ImageSource, steps: int, seed: int, device: torch.device
) -> Any:
    """An AutoencoderKL of 0.6 M parameters with ``channels`` latent channels, in half precision, on the CPU.

    It is trained for ``steps`` steps on ``images``, on ``device``. Its loss is L1 + 1e-4 KL; the KL is summed
    over channels and averaged over positions. Its configuration scales latents to mean 0 and standard
    deviation 1. Raises TrainingError if the loss becomes infinite or NaN.
    """
    order = images.batches(BATCH, ("autoencoder", seed), 0)
    batches = (batch.pixels.to(device) for batch in order)
    vae = _autoencoder(channels).to(device)
    _fit(vae, batches, steps)
    _set_scale(vae, torch.cat([next(batches) for _ in range(32)]))
    return vae.cpu().half()


def _autoencoder(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 48),  # type: ignore[arg-type] (diffusers' hints lack an ellipsis)
        down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def _fit(vae: Any, batches: Iterator[Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    for step, pixels in zip(range(steps), batches, strict=False):
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        # diffusers sums the KL over all of an image's latents, at 8 x 8 positions
        loss = (restored - pixels).abs().mean() + KL_WEIGHT * posterior.kl().mean() / 64
        if not torch.isfinite(loss):
            raise TrainingError(f"the autoencoder's loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"autoencoder  {step}/{steps}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def _set_scale(vae: Any, pixels: Tensor) -> None:
    latents = vae.encode(pixels).latent_dist.mean
    vae.register_to_config(shift_factor=round(latents.mean().item(), 4))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
