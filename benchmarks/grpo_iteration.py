"""Measures the cost of an iteration of Flow-GRPO, beside the straightforward one.

    python benchmarks/grpo_iteration.py
    python benchmarks/grpo_iteration.py --device cuda --model sd35m --batch 48 --group 24 --micro-batch 8

The straightforward iteration encodes each sample's prompt, guides in two forwards, waits for the rewards, and
keeps the latents of all steps; the reference is the model without its adapter.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from _bench import arguments
from _compare import compare
from _online import Iteration
from torch import Tensor

from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.engine.rehearsal import rehearse
from posttrain.flow import expand, guided, log_prob, stochastic_step


def main() -> None:
    options = arguments(__doc__ or "", 8, group=4, steps=10, micro_batch=4)
    grpo = FlowGRPO(group_size=options.group, num_steps=options.steps)
    our = Iteration(options, grpo)
    transformer = our.model.transformer

    def both(x: Tensor, sigma: float, condition: dict, empty: dict) -> Tensor:
        v = our.velocity(x, sigma, condition)
        return guided(v, our.velocity(x, sigma, empty), grpo.guidance_scale)

    def step(x: Tensor, v: Tensor, at: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        s, s_next, s_max = (torch.full((len(x),), value, device=x.device) for value in at)
        return stochastic_step("flow_sde", x, v, s, s_next, grpo.noise_level, expand(s_max, x))

    def straightforward() -> None:
        condition, empty = our.condition(our.prompts), our.condition([""] * our.count)
        sigmas = our.sigmas(grpo.num_steps)
        x, path = our.draws.normal("initial", our.shape), []
        with torch.no_grad():
            for i, (s, s_next) in enumerate(pairwise(sigmas)):
                chunks = []
                for start in range(0, our.count, our.micro):
                    part = slice(start, start + our.micro)
                    rows, none = ({k: v[part] for k, v in c.items()} for c in (condition, empty))
                    chunks.append(both(x[part], s, rows, none))
                mean, std = step(x, torch.cat(chunks), (s, s_next, sigmas[1]))
                new = mean + std * our.draws.normal(f"step.{i}", our.shape)
                path.append((x, new, (s, s_next, sigmas[1]), log_prob(new, mean, std)))
                x = new
            advantage = our.advantages(x)
        our.strategy.zero_grad()
        for before, after, at, old in path[: grpo.trained_steps]:
            for start in range(0, our.count, our.micro):
                part = slice(start, start + our.micro)
                rows, none = ({k: v[part] for k, v in c.items()} for c in (condition, empty))
                with torch.no_grad():
                    transformer.disable_adapters()
                    reference, std = step(before[part], both(before[part], at[0], rows, none), at)
                    transformer.enable_adapters()
                mean, std = step(before[part], both(before[part], at[0], rows, none), at)
                ratio = (log_prob(after[part], mean, std) - old[part]).exp()
                clipped = ratio.clamp(1 - grpo.clip_range, 1 + grpo.clip_range)
                loss = -torch.minimum(ratio * advantage[part], clipped * advantage[part])
                kl = ((mean - reference).square() / (2 * std**2)).flatten(1).mean(1)
                our.strategy.backward((loss + grpo.beta * kl).sum() / (our.count * grpo.trained_steps))
        our.strategy.step(1.0)

    compare(our.it, our.engine, straightforward, our.count, rehearse(grpo).forward_equivalents)
    our.judge.close()


if __name__ == "__main__":
    main()
