"""Measures the cost of an iteration of DiffusionNFT, beside the straightforward one.

    python benchmarks/nft_iteration.py
    python benchmarks/nft_iteration.py --device cuda --model sd35m --batch 48 --group 24 --micro-batch 8

The straightforward iteration encodes each sample's prompt, keeps the old policy as a second model, waits for
the rewards, and trains the noise levels one after the other.
"""

from __future__ import annotations

import copy

import torch
from _bench import arguments
from _compare import compare
from _online import Iteration

from posttrain.algorithms.diffusion_nft import DiffusionNFT, implicit_losses
from posttrain.engine.rehearsal import rehearse
from posttrain.flow import interpolate
from posttrain.flow.solvers import solve


def main() -> None:
    options = arguments(__doc__ or "", 8, group=4, steps=10, micro_batch=4)
    nft = DiffusionNFT(group_size=options.group, num_steps=options.steps)
    our = Iteration(options, nft)
    trained = our.model.transformer
    old = copy.deepcopy(trained)

    def straightforward() -> None:
        condition, sigmas = our.condition(our.prompts), our.sigmas(nft.num_steps)
        parts = [slice(start, start + our.micro) for start in range(0, our.count, our.micro)]
        rows = [{k: v[part] for k, v in condition.items()} for part in parts]
        noise, made = our.draws.normal("initial", our.shape), []
        with torch.no_grad():
            our.model.transformer = old
            for part, row in zip(parts, rows, strict=True):
                made.append(
                    solve(lambda x, s, row=row: our.velocity(x, s, row), noise[part], sigmas, nft.solver)
                )
            x0 = torch.cat(made)
            our.model.transformer = trained
            advantage = our.advantages(x0)
        good = (advantage / (2 * nft.adv_clip_max) + 0.5).clamp(0, 1)
        levels = our.draws.permutations("times", nft.num_steps)[:, : max(nft.trained_steps, 1)]
        our.strategy.zero_grad()
        for level in range(levels.shape[1]):
            sigma = torch.tensor(sigmas, device=x0.device)[levels[:, level]]
            x = interpolate(x0, our.draws.normal(f"noise.{level}", our.shape), sigma)
            for part, row in zip(parts, rows, strict=True):
                with torch.no_grad():
                    our.model.transformer = old
                    v_old = our.velocity(x[part], sigma[part], row)
                    our.model.transformer = trained
                    trained.disable_adapters()
                    reference = our.velocity(x[part], sigma[part], row)
                    trained.enable_adapters()
                v, at = our.velocity(x[part], sigma[part], row), (x[part], x0[part], sigma[part])
                positive, negative = implicit_losses(v, v_old, *at, nft.beta)
                loss = nft.adv_clip_max / nft.beta * (good[part] * positive + (1 - good[part]) * negative)
                loss = loss + nft.kl_weight * (v - reference).square().flatten(1).mean(1)
                our.strategy.backward(loss.sum() / levels.numel())
        our.strategy.step(1.0)

    compare(our.it, our.engine, straightforward, our.count, rehearse(nft).forward_equivalents)
    our.judge.close()


if __name__ == "__main__":
    main()
