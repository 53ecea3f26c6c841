"""Measures the engine as it is on one GPU: every algorithm, eager and compiled, in SD3.5 Medium's shape.

    OUT=runs/gpu python benchmarks/gpu_table.py --seconds 240
    python benchmarks/gpu_table.py --tiny

One model at a time: first the one with a LoRA, then the one that is trained whole. Entries are in the order
of their importance. A SOAR step has 6 points and batch 4, all images 512 px and prompts 77 + 256 tokens,
where nothing else is said. Weights are random: they change no time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import Bench, bench
from _gpu import Session, command_line, halved
from _profile import kernels
from _soar import SoarStep
from gpu_model import Work, as_set, in_8_bits, online, options_of, sampling, sft

from posttrain.algorithms.diffusion_nft import DiffusionNFT
from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.engine.rehearsal import rehearse
from posttrain.policy.activations import Checkpointing
from posttrain.policy.tuning import Lora
from posttrain.support.device import synchronize

POINTS = 6
Entry = tuple[str, float, Callable[[], dict[str, Any]]]
"""Its name, the seconds that it takes on an H100, and the work."""


class Table:
    """The entries of one model."""

    def __init__(self, session: Session, work: Work) -> None:
        self.session, self.work = session, work
        self.tiny = session.options.tiny

    def soar(self, step: SoarStep, checkpointing: Checkpointing, compiled: bool, rows: int) -> dict[str, Any]:
        """A SOAR step with ``rows`` at a time, or fewer where they do not fit."""

        def go(size: int) -> dict[str, Any]:
            step.policy.micro_batch = size
            try:
                return self.session.timed(step.engine, step.count, flops)
            finally:
                step.strategy.zero_grad()

        flops = self.work.of(step.it, rehearse(step.soar).forward_equivalents)
        with as_set(step.it, checkpointing, compiled=compiled):
            return halved(go, rows, self.session)

    def profile(self, name: str, it: Bench, run: Callable[[], object], compiled: bool) -> dict[str, Any]:
        file = Path(os.environ.get("OUT", "runs/gpu")) / f"{name}.txt"
        with as_set(it, "off", compiled=compiled):
            return kernels(run, self.session.device, file)


class WithLora(Table):
    """SOAR, Flow-GRPO and DiffusionNFT on a LoRA of rank 32 beside bf16 weights."""

    def __init__(self, session: Session, work: Work) -> None:
        super().__init__(session, work)
        self.it = bench(options_of(session), Lora())
        self.step = SoarStep(self.it, POINTS, 4)

    def entries(self) -> list[Entry]:
        """What is measured, the most important first."""
        soar = partial(self.soar, self.step)
        return [
            ("lora soar compiled off", 40, lambda: soar("off", True, 14)),
            ("grpo compiled", 43, lambda: self.grpo(True, 48)),
            ("nft compiled", 51, lambda: self.nft(True, 24)),
            ("lora soar compiled 0.5", 40, lambda: soar(0.5, True, 14)),
            ("lora soar compiled 0.2", 40, lambda: soar(0.2, True, 28)),
            ("grpo profile", 35, self.grpo_profile),
            ("lora soar compiled full", 40, lambda: soar("full", True, 28)),
            ("grpo eager", 16, lambda: self.grpo(False, 24)),
            ("lora soar eager off", 12, lambda: soar("off", False, 14)),
            ("nft eager", 26, lambda: self.nft(False, 9)),
        ]

    def grpo(self, compiled: bool, count: int) -> dict[str, Any]:
        """Flow-GRPO at 384 px, 10 steps of which 3 are stochastic and trained, no guidance."""
        algorithm = FlowGRPO(
            group_size=4 if self.tiny else 24,
            num_steps=10,
            sde_window_size=3,
            guidance_scale=1.0,
            beta=0.0,
        )
        count = 8 if self.tiny else count
        side = 32 if self.tiny else 384
        flops = 0.0

        def go(rows: int) -> dict[str, Any]:
            nonlocal flops
            made = online(self.session, self.it, algorithm, batch=count, resolution=side, micro_batch=rows)
            flops = flops or self.work.of(made.it, rehearse(algorithm).forward_equivalents)
            try:
                found = self.session.timed(made.engine, count, flops, rounds=1, settle=0)
            finally:
                made.judge.close()
                made.strategy.zero_grad()
            return {**found, "slice": count, "of": 768, "ratio_off_1": made.algorithm.first}  # type: ignore

        with as_set(self.it, "off", compiled=compiled):
            return halved(go, 4 if self.tiny else 24, self.session)

    def grpo_profile(self) -> dict[str, Any]:
        """One update of Flow-GRPO as above, 24 images, compiled."""
        algorithm = FlowGRPO(group_size=24, num_steps=10, sde_window_size=3, guidance_scale=1.0, beta=0.0)
        made = online(self.session, self.it, algorithm, batch=24, micro_batch=24, resolution=384)
        if self.tiny:
            small = FlowGRPO(group_size=4, num_steps=4, sde_window_size=2, guidance_scale=1.0, beta=0.0)
            made = online(self.session, self.it, small, batch=4, micro_batch=4, resolution=32)
        made.policy.compiled = True  # the blocks will be: its rollout takes the update's program
        try:
            return self.profile("grpo", self.it, made.engine, compiled=True)
        finally:
            made.judge.close()
            made.strategy.zero_grad()

    def nft(self, compiled: bool, count: int) -> dict[str, Any]:
        """DiffusionNFT as sd35m-nft-pickscore has it: a group, 10 steps of dpm2, 128 tokens."""
        model: Any = self.it.model
        count, side = (4, 32) if self.tiny else (count, 512)
        algorithm = DiffusionNFT(group_size=count, num_steps=4 if self.tiny else 10, beta=1.0)
        before = model.spec
        model.spec = before.model_copy(update={"max_sequence_length": 16 if self.tiny else 128})
        made = online(self.session, self.it, algorithm, batch=count, resolution=side, micro_batch=count)
        made.policy.compiled = compiled
        flops = self.work.of(made.it, rehearse(algorithm).forward_equivalents)
        try:
            with as_set(self.it, "off", compiled=compiled):
                found = self.session.timed(made.engine, count, flops, rounds=1, settle=0)
            return {"micro_batch": made.micro, **found, "slice": count, "of": 1152}
        finally:
            model.spec = before
            made.judge.close()
            made.strategy.zero_grad()


class Whole(Table):
    """SOAR and SFT on all weights, sampling, the autoencoder."""

    def __init__(self, session: Session, work: Work) -> None:
        super().__init__(session, work)
        self.it = bench(options_of(session))
        self.step = SoarStep(self.it, POINTS, 4, learning_rate=1e-6)

    def entries(self) -> list[Entry]:
        """What is measured, the most important first."""
        soar = partial(self.soar, self.step)
        return [
            ("soar compiled off", 38, lambda: soar("off", True, 14)),
            ("soar compiled 0.5", 38, lambda: soar(0.5, True, 28)),
            ("soar compiled 0.2", 38, lambda: soar(0.2, True, 14)),
            ("8-bit soar compiled 0.2", 42, lambda: in_8_bits(self.step, lambda: soar(0.2, True, 14))),
            ("straightforward soar", 12, self.straightforward),
            ("soar profile", 35, self.soar_profile),
            ("sft compiled", 37, lambda: self.sft(True)),
            ("soar compiled off 7", 38, lambda: soar("off", True, 7)),
            ("soar eager off", 9, lambda: soar("off", False, 4)),
            ("vae", 8, self.vae),
            ("sampling compiled", 41, lambda: self.sampling(True)),
            ("soar compiled full", 38, lambda: soar("full", True, 28)),
            ("sampling eager", 12, lambda: self.sampling(False)),
            ("soar as shipped", 16, lambda: soar("full", False, 4)),
        ]

    def soar_profile(self) -> dict[str, Any]:
        """A step with 14 rows at a time, compiled."""
        self.step.policy.micro_batch = 14
        return self.profile("soar", self.it, self.step.engine, compiled=True)

    def straightforward(self) -> dict[str, Any]:
        """The step as one writes it by hand after HY-SOAR, which computes activations again."""
        flops = self.work.of(self.it, rehearse(self.step.soar).forward_equivalents)
        with as_set(self.it, "full"):
            return self.session.timed(self.step.straightforward, self.step.count, flops, rounds=1, settle=0)

    def sft(self, compiled: bool) -> dict[str, Any]:
        """28 images encoded, and trained 7 at a time."""
        count = 7 if self.tiny else 28
        self.step.policy.micro_batch = 7
        with as_set(self.it, "off", compiled=compiled):
            run = sft(self.it, count, self.step)
            return {"micro_batch": 7, **self.session.timed(run, count, self.work.of(self.it, 3.0), rounds=1)}

    def sampling(self, compiled: bool) -> dict[str, Any]:
        """Images of 8 prompts, 40 steps guided by 4.5, decoded."""
        count, steps = (2, 2) if self.tiny else (8, 40)
        with as_set(self.it, "off", compiled=compiled):
            run = sampling(self.it, count, steps)
            flops = self.work.of(self.it, 2.0 * steps)
            return {"slice": count, **self.session.timed(run, count, flops, rounds=1, settle=0)}

    def vae(self) -> dict[str, Any]:
        """Images encoded and decoded as the engine does it, in float32 with TF32."""
        model, side = self.it.model, self.it.options.resolution
        count = 2 if self.tiny else 16
        pixels = torch.randn(count, 3, side, side, device=self.session.device)
        latents = torch.randn(count, *model.latent_shape(side, side), device=self.session.device)
        with torch.no_grad():
            encoded = self.session.timed(lambda: model.posterior(pixels), count)
            self.session.free()
            decoded = self.session.timed(lambda: model.decode(latents), count)
        synchronize(self.session.device)
        return {"encode": encoded, "decode": decoded}


def main() -> None:
    session = Session(command_line(__doc__ or ""), "table")
    session.measure_rate()
    name = torch.cuda.get_device_name() if session.device.type == "cuda" else "1 CPU thread"
    session.say("device", name=name, torch=torch.__version__, matmul_tflops=session.rate / 1e12)
    work = Work()
    for kind, part in ((WithLora, 0.55), (Whole, 1.0)):
        session.limit = part * session.options.seconds
        try:
            if session.wants_some(NAMES[kind]):
                measure(kind, session, work)
        except Exception as error:  # the other model is to be measured
            session.say(f"model {kind.__name__}", error=f"{type(error).__name__}: {str(error)[:400]}")
        session.free()


def measure(kind: type[WithLora] | type[Whole], session: Session, work: Work) -> None:
    """Every entry of a model, which is gone when this returns."""
    table = kind(session, work)
    session.say(f"model {kind.__name__}", forward_tflop=work.of(table.it, 1.0) / 1e12)
    for entry, cost, run in table.entries():
        session.entry(entry, cost, run)


NAMES: dict[type[Table], list[str]] = {
    WithLora: ["lora", "grpo", "nft"],
    Whole: ["soar", "8-bit", "sft", "vae", "sampling", "straightforward"],
}
"""How the names of a model's entries begin."""

if __name__ == "__main__":
    main()
