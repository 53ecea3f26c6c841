"""The models and steps that the entries of ``gpu_table.py`` measure."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _bench import Bench
from _gpu import Session
from _model import forward_flops
from _online import Iteration
from _soar import SoarStep
from torch._functorch import config as partitioner

from posttrain.algorithm import Algorithm, Tools
from posttrain.algorithms.sft import SFT
from posttrain.data.batches import encoded
from posttrain.data.loader import ImageBatch
from posttrain.engine.compiling import OPTIONS
from posttrain.engine.trainer import update
from posttrain.optim.optimizers import optimizer_of
from posttrain.policy.activations import Checkpointing, checkpoint_blocks, share_kept
from posttrain.policy.blocks import blocks
from posttrain.recipe.schema import Evaluation
from posttrain.sampling.sampler import FlowSampler
from posttrain.support.randomness import Draws


def options_of(session: Session, **changes: Any) -> argparse.Namespace:
    """What the benchmarks' command line would say: the true shape at 512 px in bf16, batches of 4."""
    tiny = session.options.tiny
    chosen = {
        "device": session.device.type,
        "model": "tiny" if tiny else "sd35m",
        "text_encoders": "tiny",
        "resolution": 32 if tiny else 512,
        "precision": "bf16",
        "batch": 2 if tiny else 4,
        "micro_batch": 4,
        **changes,
    }
    return argparse.Namespace(**chosen)


@contextlib.contextmanager
def as_set(it: Bench, checkpointing: Checkpointing = "off", *, compiled: bool = False) -> Iterator[None]:
    """Within the block the transformer's blocks are checkpointed and compiled so."""
    parts = blocks(it.model.transformer)
    whole_blocks = checkpointing == "full" or not compiled
    checkpoint_blocks(it.model.transformer, checkpointing if whole_blocks else "off")
    if compiled:
        partitioner.activation_memory_budget = share_kept(checkpointing)
        torch.compiler.reset()
        for block in parts:
            block.compile(**OPTIONS)
    for policy in it.policies:
        policy.compiled = compiled
    try:
        yield
    finally:
        for policy in it.policies:
            policy.compiled = False
        for block in parts:
            block._compiled_call_impl = None
        checkpoint_blocks(it.model.transformer, "off")


class Work:
    """FLOPs of a forward of one sample, counted once for each size of image and prompt."""

    def __init__(self) -> None:
        self.counted: dict[tuple[int, int], int] = {}

    def of(self, it: Bench, forward_equivalents: float) -> float:
        tokens = it.model.spec.max_sequence_length  # type: ignore[attr-defined]
        key = it.options.resolution, tokens
        if key not in self.counted:
            self.counted[key] = forward_flops(it)
        return self.counted[key] * forward_equivalents


class Watched:
    """An algorithm, and how far its ratios were off 1 in the first micro-batch of its first update."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm, self.first = algorithm, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.algorithm, name)

    def loss(self, items: Any, policy: Any) -> Any:
        losses = self.algorithm.loss(items, policy)
        if self.first is None and "ratio_deviation" in losses.metrics:
            self.first = losses.metrics["ratio_deviation"].detach().max().item()
        return losses


def in_8_bits(step: SoarStep, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns while the optimizer of ``step`` keeps its moments in 8 bits. With float32 ones,
    masters, moments, gradients and bf16 weights alone take 40 GB."""
    weights = list(step.policy.trained.values())
    changed = step.settings.model_copy(update={"optimizer": "adamw8bit"})
    try:
        step.strategy.optimizer = optimizer_of(changed, weights)
        return work()
    finally:
        step.strategy.optimizer = optimizer_of(step.settings, weights)


def online(session: Session, it: Bench, algorithm: Algorithm, **changes: Any) -> Iteration:
    """Iterations of an online algorithm on the model of ``it``, which has a LoRA."""
    options = options_of(session, **changes)
    made = Iteration(options, Watched(algorithm), Bench(options, it.model))  # type: ignore[arg-type]
    made.policy.compiled = blocks(it.model.transformer)[0]._compiled_call_impl is not None
    return made


def sft(it: Bench, count: int, step: SoarStep) -> Callable[[], None]:
    """A step of supervised fine-tuning on ``count`` images, by the policy and optimizer of a SOAR step."""
    algorithm, ids, side = SFT(), list(range(count)), it.options.resolution
    pixels, captions = torch.randn(count, 3, side, side), it.captions(count)
    draws = Draws((0, 0, 1), ids, it.device)

    def run() -> None:
        batch = encoded(ImageBatch(0, 0, ids, pixels, captions, ids, (side, side)), it.model, draws)
        with torch.no_grad(), step.policy.casts_kept():
            items = algorithm.collect(batch, Tools(step.policy, draws))
        update(algorithm, step.policy, items, step.strategy, step.settings)

    return run


def sampling(it: Bench, count: int, steps: int) -> Callable[[], object]:
    """An evaluation's images of ``count`` prompts, guided by 4.5."""
    settings = Evaluation(
        prompts="unused.txt",  # type: ignore[arg-type]
        rewards=["jpeg_incompressibility"],  # type: ignore[list-item]
        resolution=it.options.resolution,
        steps=steps,
        guidance=4.5,
        batch_size=count,
    )
    sampler = FlowSampler(it.policy(64))
    captions = it.captions(count)
    return lambda: sampler.images(captions, [0] * count, settings)
