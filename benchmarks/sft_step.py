"""Measures the cost of a step of supervised fine-tuning, beside a loop as one writes it by hand.

    python benchmarks/sft_step.py
    python benchmarks/sft_step.py --device cuda --model sd35m --batch 8 --micro-batch 4

The straightforward step encodes text and images, and makes one forward and one backward of the whole batch.
"""

from __future__ import annotations

import torch
from _bench import arguments, bench, watched
from _compare import compare

from posttrain.algorithm import Tools
from posttrain.algorithms.sft import SFT
from posttrain.data.batches import encoded
from posttrain.data.loader import ImageBatch
from posttrain.distributed.world import ALONE
from posttrain.engine.rehearsal import rehearse
from posttrain.engine.trainer import update
from posttrain.flow import interpolate
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.support.randomness import Draws


def main() -> None:
    options = arguments(__doc__ or "", 16, micro_batch=8)
    it, sft = bench(options), SFT()
    model, settings = it.model, Train(steps=1, learning_rate=1e-5)
    policy, count, side = it.policy(options.micro_batch), options.batch, options.resolution
    strategy = Single().prepare(policy, settings, ALONE)
    pixels, captions = torch.randn(count, 3, side, side), it.captions(count)
    draws = Draws((0, 0, 0), range(count), it.device)
    watched(it)

    def engine() -> None:
        images = ImageBatch(0, 0, list(range(count)), pixels, captions, list(range(count)), (side, side))
        batch = encoded(images, model, draws)
        with torch.no_grad(), policy.casts_kept():
            items = sft.collect(batch, Tools(policy, draws))
        with it.timed("training"):
            update(sft, policy, items, strategy, settings)

    def straightforward() -> None:
        condition, shape = model.encode_prompts(captions), model.latent_shape(side, side)
        x0, noise = (
            model.encode_images(pixels, draws.normal("posterior", shape)),
            draws.normal("noise", shape),
        )
        sigma = model.sigma(torch.sigmoid(draws.normal("timestep", ())), x0.shape[-2:])
        with torch.autocast(it.device.type, dtype=it.autocast, enabled=it.autocast is not None):
            v = model.velocity(interpolate(x0, noise, sigma), sigma, condition)
            loss = (v - (noise - x0)).square().mean()
        strategy.zero_grad()
        strategy.backward(loss)
        strategy.step(1.0)

    compare(it, engine, straightforward, count, rehearse(sft).forward_equivalents)


if __name__ == "__main__":
    main()
