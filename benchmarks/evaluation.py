"""Measures the cost of evaluating images of prompts, beside the straightforward way.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --device cuda --model sd35m --batch 16 --steps 40

The straightforward way draws one image after the other, guided in two forwards, and scores it by itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _bench import arguments, bench, watched
from _compare import compare

from posttrain.flow import guided
from posttrain.flow.solvers import solve
from posttrain.recipe.schema import Evaluation
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.sampling.latents import prompt_noise
from posttrain.sampling.sampler import FlowSampler
from posttrain.scoring.batches import draw_and_score, load_scorers


def main() -> None:
    options = arguments(__doc__ or "", 8, steps=10, images=16)
    it, side = bench(options), options.resolution
    settings = Evaluation(
        prompts=Path("unused.txt"),  # type: ignore[arg-type]
        rewards=["jpeg_incompressibility"],  # type: ignore[list-item]
        resolution=side,
        steps=options.steps,
        batch_size=options.batch,
    )
    model, sampler = it.model, FlowSampler(it.policy(64))
    scorers = load_scorers([JpegIncompressibility()], it.device)
    score = scorers["jpeg_incompressibility"]
    samples = [({"prompt": prompt}, 0) for prompt in it.captions(options.images)]
    watched(it)

    def engine() -> None:
        for _ in draw_and_score(sampler, settings, samples, scorers):
            pass

    @torch.no_grad()
    def straightforward() -> None:
        for row, index in samples:
            condition, empty = model.encode_prompts([row["prompt"]]), model.encode_prompts([""])

            def velocity(x, s, condition=condition, empty=empty):
                at = torch.full((1,), s, device=x.device)
                with torch.autocast(it.device.type, dtype=it.autocast, enabled=it.autocast is not None):
                    v = model.velocity(x, at, condition)
                    return guided(v, model.velocity(x, at, empty), settings.guidance)

            noise = prompt_noise(settings.seed, row["prompt"], index, model.latent_shape(side, side))
            sigmas = model.sigmas(settings.steps, side, side)
            x0 = solve(velocity, noise[None].to(it.device), sigmas, settings.solver)
            score(model.decode(x0).cpu(), [row["prompt"]], [row])

    compare(it, engine, straightforward, len(samples), 2.0 * settings.steps)


if __name__ == "__main__":
    main()
