"""What the benchmarks share: the command line, a tuned model on its device, and a clock for its parts."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _model import model_of

from posttrain.engine.modes import EAGER
from posttrain.model import FlowModel
from posttrain.policy import Policy
from posttrain.policy.precision import AUTOCAST
from posttrain.policy.tuning import Full, Tune
from posttrain.support.device import synchronize

WORDS = ["red", "green", "blue", "circle", "square", "triangle", "left", "right", "above", "below"]


@dataclass
class Bench:
    """A model on a device, and how it is measured."""

    options: argparse.Namespace
    model: FlowModel
    policies: list[Policy] = field(default_factory=list)
    """All policies of the model."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the engine's time goes."""
    open: list[str] = field(default_factory=list)
    """The parts that are being timed, the innermost last."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def autocast(self) -> torch.dtype | None:
        return AUTOCAST[self.options.precision]

    def policy(self, chunk: int) -> Policy:
        """The model's policy, whose parameters are as they were tuned."""
        self.policies.append(Policy(self.model, autocast=self.autocast, micro_batch=chunk))
        return self.policies[-1]

    def captions(self, count: int) -> list[str]:
        return [f"a {WORDS[i % 10]} {WORDS[i // 10 % 10]}" for i in range(count)]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's time to ``part``, on the main thread; a block inside it counts by itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        inside = sum(self.seconds.values())
        synchronize(self.device)
        self.open.append(part)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.open.pop()
        own = time.perf_counter() - start - (sum(self.seconds.values()) - inside)
        self.seconds[part] = self.seconds.get(part, 0.0) + own


def arguments(title: str, batch: int, **more: Any) -> argparse.Namespace:
    """The command line of a benchmark; ``more`` are its own numbers and their defaults."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=("tiny", "sd35m"), default="tiny")
    parser.add_argument("--text-encoders", choices=("tiny", "true"), default="tiny")
    parser.add_argument("--resolution", type=int, help="64, and 512 of sd35m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32, and bf16 of sd35m")
    parser.add_argument("--batch", type=int, default=batch, help="samples in a step or an iteration")
    parser.add_argument("--rounds", type=int, default=7, help="repeats of each, alternating")
    parser.add_argument("--compile", type=int, default=0, help="1 compiles the engine's transformer blocks")
    parser.add_argument("--checkpointing", choices=EAGER, default="off", help="of the engine's gradients")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, as posttrain plan reads it")
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    large = options.model == "sd35m"
    options.resolution = options.resolution or (512 if large else 64)
    options.precision = options.precision or ("bf16" if large else "fp32")
    return options


def bench(options: argparse.Namespace, tune: Tune | None = None) -> Bench:
    """The model of the command line, tuned, on its device."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.device == "cpu":
        torch.set_num_threads(1)
    device, tokens = torch.device(options.device), 16 if options.model == "tiny" else 256
    model = model_of(options, tokens, device, tune is not None)
    # a fresh output layer is zero, and every velocity and most gradients with it
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.02)
    (tune or Full()).apply(model.transformer, 0)
    return Bench(options, model)


def watched(it: Bench) -> None:
    """Let the model's parts tell how long they take: text and images encoded, rollout, reward."""
    model: Any = it.model
    for name, part in (("encode_prompts", "encoding"), ("encode_images", "encoding"), ("decode", "reward")):
        setattr(model, name, _clocked(it, getattr(model, name), part))
    velocity = model.velocity

    def clocked(*arguments: Any) -> Any:
        if torch.is_grad_enabled() or it.open:
            return velocity(*arguments)
        with it.timed("rollout"):
            return velocity(*arguments)

    model.velocity = clocked


def _clocked(it: Bench, function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with it.timed(part):
            return function(*arguments)

    return call
