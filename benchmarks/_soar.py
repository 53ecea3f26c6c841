"""A SOAR step as the engine makes it, and as one writes it by hand after HY-SOAR."""

from __future__ import annotations

import torch
from _bench import Bench

from posttrain.algorithm import Tools
from posttrain.algorithms.soar import SOAR, auxiliary_point
from posttrain.data.batches import encoded
from posttrain.data.loader import ImageBatch
from posttrain.distributed.world import ALONE
from posttrain.engine.trainer import update
from posttrain.flow import expand, guided, interpolate
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.support.randomness import Draws


class SoarStep:
    """Both steps on one batch of ``it.options.batch`` samples and ``points`` auxiliary points."""

    def __init__(self, it: Bench, points: int, micro_batch: int, learning_rate: float = 1e-5) -> None:
        self.it, self.soar = it, SOAR(trajectory_length=points)
        self.settings = Train(steps=1, learning_rate=learning_rate)
        self.count, self.side = it.options.batch, it.options.resolution
        self.policy = it.policy(micro_batch)
        self.strategy = Single().prepare(self.policy, self.settings, ALONE)
        self.pixels, self.captions = torch.randn(self.count, 3, self.side, self.side), it.captions(self.count)
        self.draws = Draws((0, 0, 0), range(self.count), it.device)

    def engine(self, soar: SOAR | None = None) -> None:
        """Text and images encoded, one guided rollout step, micro-batches of all points, the optimizer."""
        soar, ids, model = soar or self.soar, list(range(self.count)), self.it.model
        images = ImageBatch(0, 0, ids, self.pixels, self.captions, ids, (self.side, self.side))
        batch = encoded(images, model, self.draws)
        with torch.no_grad(), self.policy.casts_kept():
            items = soar.collect(batch, Tools(self.policy, self.draws))
        with self.it.timed("training"):
            update(soar, self.policy, items, self.strategy, self.settings)

    def straightforward(self) -> None:
        """Guidance in two forwards, the rollout under autograd, a forward for each point, one backward."""
        it, model, soar, draws = self.it, self.it.model, self.soar, self.draws
        condition, empty = model.encode_prompts(self.captions), model.encode_prompts([""] * self.count)
        shape = model.latent_shape(self.side, self.side)
        x0 = model.encode_images(self.pixels, draws.normal("posterior", shape))
        noise = draws.normal("noise", shape)
        t0 = torch.sigmoid(draws.normal("timestep", ()))
        t1 = (t0 - 1 / soar.num_sampling_steps).clamp(min=0)
        sigma0, sigma1 = (model.sigma(t, x0.shape[-2:]) for t in (t0, t1))
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
        self.strategy.zero_grad()
        self.strategy.backward(loss)
        self.strategy.step(1.0)
