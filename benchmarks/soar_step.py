"""What does a SOAR step cost, beside the straightforward step and beside a bare PyTorch loop?

    python benchmarks/soar_step.py [--batch 4] [--rounds 15]

Counted: FLOPs and peak bytes saved for the backward. Timed, side by side in one process and as a ratio of
medians of alternating rounds: the engine against a bare loop that does the same arithmetic. Weights are
random; the shape is tiny-sd3's. Exits with 1 where a bound that the project promises does not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from posttrain.algorithm import Batch, Tools
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR, auxiliary_point
from posttrain.condition import Conditions
from posttrain.flow import expand, guided, interpolate, shift_sigma
from posttrain.policy import Policy
from posttrain.randomness import Draws
from posttrain.train_settings import Train
from posttrain.trainer import update

WIDTH, TOKENS = 96, 32


class RandomModel:
    """The parts of a FlowModel that a step needs."""

    shift = 3.0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cpu")
        self.transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=5, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=128,
            pooled_projection_dim=WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
        )  # fmt: skip

    def velocity(self, latents, sigma, condition):
        return self.transformer(hidden_states=latents, timestep=1000 * sigma, return_dict=False, **condition)[
            0
        ].float()


class SavedBytes:
    """Bytes that autograd holds for the backward, at their peak; each storage counts once."""

    def __enter__(self):
        self.held: dict[int, list] = {}
        self.now = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def _pack(self, tensor):
        class Holder:
            pass

        holder = Holder()
        holder.tensor = tensor
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            entry = self.held.setdefault(key, [0, size])
            if entry[0] == 0:
                self.now += size
                self.peak = max(self.peak, self.now)
            entry[0] += 1
            weakref.finalize(holder, self._free, key)
        return holder

    def _free(self, key):
        entry = self.held[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.held[key]


def batch_of(model: RandomModel, count: int) -> tuple[Batch, Draws]:
    """``count`` random samples with their own prompts."""
    table = {
        "encoder_hidden_states": torch.randn(count + 1, TOKENS, WIDTH),
        "pooled_projections": torch.randn(count + 1, WIDTH),
    }
    batch = Batch(torch.randn(count, 8, 8, 8), torch.arange(1, count + 1), Conditions(table))
    return batch, Draws((0, 0, 0), range(count))


def engine_step(algorithm, policy: Policy, batch: Batch, draws: Draws, settings: Train) -> Callable[[], None]:
    """One optimizer step as the trainer takes it."""
    optimizer = torch.optim.SGD(policy.trained.values(), lr=0.0)

    def step() -> None:
        with torch.no_grad():
            items = algorithm.collect(batch, Tools(policy, draws))
        update(algorithm, policy, items, optimizer, settings, 1)

    return step


def straightforward_step(soar: SOAR, model: RandomModel, batch: Batch, draws: Draws) -> Callable[[], None]:
    """SOAR as published: the rollout under autograd, every graph alive until one backward."""
    conditions, rows, x0 = batch.conditions, batch.prompt, batch.latents
    condition, empty = conditions.rows(rows), conditions.empty(len(batch))

    def step() -> None:
        noise = draws.normal("noise", x0.shape[1:])
        t0 = torch.sigmoid(draws.normal("timestep", ()))
        t1 = (t0 - 1 / soar.num_sampling_steps).clamp(min=0)
        sigma0, sigma1 = shift_sigma(t0, model.shift), shift_sigma(t1, model.shift)
        x = interpolate(x0, noise, sigma0)
        losses = [(model.velocity(x, sigma0, condition) - (noise - x0)).square().flatten(1).mean(1)]
        v = guided(
            model.velocity(x, sigma0, condition), model.velocity(x, sigma0, empty), soar.cfg_scale_sampling
        )
        start = x + expand(sigma1 - sigma0, x) * v.detach()
        for fraction in draws.uniform("fractions.0", (soar.trajectory_length,)).unbind(1):
            latents, sigma, target = auxiliary_point(x0, noise, start, sigma1, fraction, soar.sigma_floor)
            losses.append((model.velocity(latents, sigma, condition) - target).square().flatten(1).mean(1))
        model.transformer.zero_grad()
        torch.cat(losses).mean().backward()
        _ = v  # as published, the rollout's graph lives until here

    return step


def bare_step(model: RandomModel, batch: Batch, draws: Draws, micro: int) -> Callable[[], None]:
    """An SFT step as one would write it by hand, with the same arithmetic as the engine's."""
    x0, parameters = batch.latents, list(model.transformer.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def step() -> None:
        noise = draws.normal("noise", x0.shape[1:])
        sigma = shift_sigma(torch.sigmoid(draws.normal("timestep", ())), model.shift)
        x, target = interpolate(x0, noise, sigma), noise - x0
        optimizer.zero_grad(set_to_none=True)
        for i in range(0, len(x0), micro):
            part = slice(i, i + micro)
            condition = {k: v[batch.prompt[part]] for k, v in batch.conditions.table.items()}
            error = model.velocity(x[part], sigma[part], condition) - target[part]
            (error.square().flatten(1).mean(1).sum() / len(x0)).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not norm.isfinite():
            raise RuntimeError("not finite")
        optimizer.step()

    return step


def flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(step: Callable[[], None]) -> int:
    with SavedBytes() as saved:
        step()
    return saved.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = RandomModel()
    batch, draws = batch_of(model, options.batch)
    policy = Policy(model)  # type: ignore[arg-type]
    wide, narrow = Train(steps=1, micro_batch=options.batch), Train(steps=1, micro_batch=1)

    def soar(points: int, settings: Train) -> Callable[[], None]:
        return engine_step(SOAR(trajectory_length=points), policy, batch, draws, settings)

    straight = straightforward_step(SOAR(), model, batch, draws)
    failed = []

    def report(what: str, value: float, bound: float) -> None:
        ok = value <= bound
        print(f"{'ok  ' if ok else 'FAIL'}  {what}: {value:.3f} (at most {bound:.3f})")
        if not ok:
            failed.append(what)

    ours, theirs = flops(soar(6, wide)), flops(straight)
    print(
        f"FLOPs per sample, 6 points: engine {ours / options.batch:.4g}, "
        f"straightforward {theirs / options.batch:.4g}"
    )
    report("FLOPs of the engine's step over the straightforward one's", ours / theirs, 1.0)
    six, many = saved_bytes(soar(6, narrow)), saved_bytes(soar(24, narrow))
    report("saved bytes with 24 points over 6 points, chunk 1", many / six, 1.05)
    straight_bytes = saved_bytes(straight)
    print(f"saved bytes at the peak: engine with chunk 1 {six:,}, straightforward {straight_bytes:,}")
    report("saved bytes of the engine (chunk 1) over the straightforward step's", six / straight_bytes, 1 / 6)

    micro = max(1, options.batch // 2)
    settings = Train(steps=1, micro_batch=micro)
    pair = (engine_step(SFT(), policy, batch, draws, settings), bare_step(model, batch, draws, micro))
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(options.rounds + 2):
        for step, kept in zip(pair, times, strict=True):
            start = time.perf_counter()
            for _ in range(5):
                step()
            if round_ > 1:
                kept.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    report("time of the engine's SFT step over the bare loop's", statistics.median(ratios), 1.05)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
