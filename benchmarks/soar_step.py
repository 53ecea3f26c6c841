"""What does a SOAR step cost, beside the straightforward one?

    python benchmarks/soar_step.py
    python benchmarks/soar_step.py --device cuda --model sd35m --checkpoint-straightforward 1

The straightforward step is as published: guidance in two forwards, the rollout under autograd, one forward
for each auxiliary point, and one backward for all. At SD3.5 Medium's size its graphs fit no GPU without
gradient checkpointing; the engine's micro-batches need none.
"""

from __future__ import annotations

import torch
from _bench import arguments, bench, compare, peak, watched

from posttrain.algorithm import Tools
from posttrain.algorithms.soar import SOAR, auxiliary_point
from posttrain.data.loader import ImageBatch
from posttrain.feeds import encoded
from posttrain.flow import expand, guided, interpolate, shift_sigma
from posttrain.parallel.single import Single
from posttrain.parallel.world import ALONE
from posttrain.randomness import Draws
from posttrain.rehearsal import rehearse
from posttrain.train_settings import Train
from posttrain.trainer import update


def main() -> None:
    options = arguments(__doc__ or "", 4, points=6, micro_batch=4, checkpoint_straightforward=0)
    it, soar = bench(options), SOAR(trajectory_length=options.points)
    model, settings = it.model, Train(steps=1, learning_rate=1e-5)
    policy, count, side = it.policy(options.micro_batch), options.batch, options.resolution
    strategy = Single().prepare(policy, settings, ALONE)
    optimizer = strategy.optimizer
    pixels, captions = torch.randn(count, 3, side, side), it.captions(count)
    draws = Draws((0, 0, 0), range(count), it.device)
    watched(it)

    def engine(soar: SOAR = soar) -> None:
        batch = encoded(
            ImageBatch(0, 0, list(range(count)), pixels, captions, list(range(count)), (side, side)),
            model,
            draws,
        )
        with torch.no_grad():
            items = soar.collect(batch, Tools(policy, draws))
        with it.timed("training"):
            update(soar, policy, items, strategy, settings, 1)

    def straightforward() -> None:
        if options.checkpoint_straightforward:
            model.transformer.enable_gradient_checkpointing()
        condition, empty = model.encode_prompts(captions), model.encode_prompts([""] * count)
        shape = model.latent_shape(side, side)
        x0, noise = (
            model.encode_images(pixels, draws.normal("posterior", shape)),
            draws.normal("noise", shape),
        )
        t0 = torch.sigmoid(draws.normal("timestep", ()))
        t1 = (t0 - 1 / soar.num_sampling_steps).clamp(min=0)
        sigma0, sigma1 = shift_sigma(t0, model.shift), shift_sigma(t1, model.shift)
        with torch.autocast(it.device.type, dtype=it.autocast, enabled=it.autocast is not None):
            x = interpolate(x0, noise, sigma0)
            v = model.velocity(x, sigma0, condition)
            losses = [(v - (noise - x0)).square().flatten(1).mean(1)]
            v = guided(v, model.velocity(x, sigma0, empty), soar.cfg_scale_sampling)
            start = x + expand(sigma1 - sigma0, x) * v.detach()
            for fraction in draws.uniform("fractions.0", (soar.trajectory_length,)).unbind(1):
                latents, sigma, target = auxiliary_point(x0, noise, start, sigma1, fraction, soar.sigma_floor)
                error = model.velocity(latents, sigma, condition) - target
                losses.append(error.square().flatten(1).mean(1))
            loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(policy.trained.values()), 1.0)
        optimizer.step()
        if options.checkpoint_straightforward:
            model.transformer.disable_gradient_checkpointing()

    compare(it, engine, straightforward, count, rehearse(soar).forward_equivalents)
    many = SOAR(trajectory_length=4 * options.points)
    growth = peak(it, lambda: engine(many)) / peak(it, engine)
    print(f"with {4 * options.points} points the engine's peak is {growth:.2f} times as high")


if __name__ == "__main__":
    main()
