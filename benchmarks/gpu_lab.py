"""Tries what one GPU could do with this transformer, beside the engine: nothing here is how it trains today.

    OUT=runs/gpu python benchmarks/gpu_lab.py --seconds 180
    python benchmarks/gpu_lab.py --tiny

The transformer has SD3.5 Medium's shape and plain bf16 weights, without autocast, its blocks compiled.
Measured are forward-backward at 512 px and 77 + 256 tokens, with several rows at a time and under the
compiler's memory budgets; the optimizer on float32 masters; a whole step of SOAR put together from these; a
LoRA in bf16; fp8; the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _bench import bench
from _fp8 import swap
from _gpu import Session, command_line
from _model import model_of
from gpu_model import Work, options_of
from torch import Tensor, nn

from posttrain.engine.compiling import OPTIONS
from posttrain.model import FlowModel
from posttrain.policy.blocks import blocks
from posttrain.policy.tuning import Lora

Experiment = tuple[str, float, Callable[[], dict[str, Any]]]
"""Its name, the seconds that it takes on an H100, and the work."""
BUDGET = 0.5
"""Of the activations that the compiler may keep, where nothing else is said."""


class Lab:
    """The transformer in bf16, all of it trained, or a LoRA."""

    def __init__(self, session: Session, work: Work) -> None:
        self.session, self.tiny = session, session.options.tiny
        self.it = bench(options_of(session))
        self.model: FlowModel = self.it.model
        self.flops = work.of(self.it, 1.0)
        self.transformer: nn.Module = self.model.transformer.to(torch.bfloat16)
        self.side = self.it.options.resolution
        self.condition = self.model.encode_prompts(["a red circle"])

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def rows(self, count: int) -> int:
        return min(count, 2) if self.tiny else count

    def inputs(self, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        device = self.session.device
        latents = torch.randn(rows, *self.model.latent_shape(self.side, self.side), device=device)
        condition = {name: t.repeat(rows, *[1] * (t.dim() - 1)) for name, t in self.condition.items()}
        return latents, torch.rand(rows, device=device), condition

    def forward_backward(self, rows: int) -> Callable[[], None]:
        """The velocity's squared error of ``rows`` samples, and its gradient, made anew."""
        given, target = self.inputs(rows), torch.randn(1, device=self.session.device)

        def run() -> None:
            for parameter in self.trained:
                parameter.grad = None
            (self.model.velocity(*given) - target).square().mean().backward()

        return run

    def measured(self, rows: int, budget: float = 1.0, *, compiled: bool = True) -> dict[str, Any]:
        """Time and memory of a forward-backward; ``budget`` 1 keeps every activation that autograd wants."""
        rows = self.rows(rows)
        try:
            with compiled_blocks(self.transformer, budget, compiled):
                run = self.forward_backward(rows)
                return {"rows": rows, "budget": budget, **self.session.timed(run, rows, 3 * self.flops)}
        finally:
            self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.transformer.parameters():
            parameter.grad = None

    def optimizer(self) -> tuple[list[Tensor], Callable[[], None]]:
        """Float32 masters, and a step: clipping, fused AdamW, and one fused copy to bf16."""
        weights = self.trained
        masters = [nn.Parameter(w.detach().float()) for w in weights]
        for master in masters:
            master.grad = torch.zeros_like(master)
        adamw = torch.optim.AdamW(masters, lr=1e-6, fused=True)

        def step() -> None:
            gradients = [m.grad for m in masters if m.grad is not None]
            pairs = [(g, w.grad) for g, w in zip(gradients, weights, strict=True) if w.grad is not None]
            if pairs:
                torch._foreach_copy_([to for to, _ in pairs], [of for _, of in pairs])
            torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
            adamw.step()
            with torch.no_grad():
                torch._foreach_copy_([w.detach() for w in weights], [m.detach() for m in masters])

        return list(masters), step

    def masters(self) -> dict[str, Any]:
        """The optimizer's step alone."""
        _, step = self.optimizer()
        return self.session.timed(step, 1)

    def whole_step(self, rows: int, budget: float) -> dict[str, Any]:
        """A SOAR step of 4 samples: a guided forward of 8 rows, 28 rows trained, the optimizer.

        Text and images are encoded beforehand.
        """
        rows, guided = self.rows(rows), self.inputs(self.rows(8))
        micro = 1 if self.tiny else 28 // rows
        held: list[Tensor] = []
        try:
            with compiled_blocks(self.transformer, budget, True):
                held, step = self.optimizer()
                runs = [self.inputs(rows) for _ in range(micro)]

                def run() -> None:
                    for parameter in self.trained:
                        parameter.grad = None
                    with torch.no_grad():
                        self.model.velocity(*guided)
                    for given in runs:
                        (self.model.velocity(*given).square().mean() / micro).backward()
                    step()

                found = self.session.timed(run, 4, 23 * self.flops)
                return {"rows": rows, "budget": budget, **found}
        finally:
            held.clear()
            self.zero_grad()

    def fp8(self, rows: int) -> dict[str, Any]:
        """The blocks' linear layers in fp8; cannot be undone, so it is the last."""
        swapped = sum(swap(block) for block in blocks(self.transformer))
        return {"linears": swapped, **self.measured(rows, BUDGET)}

    def adapt(self) -> None:
        """Train a LoRA in bf16 instead of the weights."""
        Lora().apply(self.transformer, 0)
        self.transformer.to(torch.bfloat16)


@contextmanager
def compiled_blocks(transformer: nn.Module, budget: float, compiled: bool) -> Iterator[None]:
    """Within the block the transformer's blocks are compiled, and keep this share of their activations."""
    from torch._functorch import config

    before, config.activation_memory_budget = config.activation_memory_budget, budget
    # dynamo would go on with what it compiled under another budget
    torch._dynamo.reset()
    for block in blocks(transformer) if compiled else ():
        block.compile(**OPTIONS)
    try:
        yield
    finally:
        config.activation_memory_budget = before
        for block in blocks(transformer):
            block._compiled_call_impl = None


def decoder(session: Session, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Images a second of the autoencoder's decoder, channels last, 4 at a time."""
    options = options_of(session, layers=1 if not session.options.tiny else 0)
    vae = model_of(options, 16, session.device).pipeline.vae.to(dtype, memory_format=torch.channels_last)
    vae.eval().requires_grad_(False)
    side = options.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(4, vae.config.latent_channels, side, side, device=session.device, dtype=dtype)
    latents = latents.to(memory_format=torch.channels_last)
    decode = torch.compile(vae.decode, **OPTIONS) if compiled else vae.decode
    with torch.no_grad():
        return session.timed(lambda: decode(latents, return_dict=False), 4)


def experiments(lab: Lab) -> list[Experiment]:
    """Of the weights themselves, the most important first."""
    return [
        ("bf16 rows 14", 9, lambda: lab.measured(14)),
        (f"bf16 rows 28 budget {BUDGET}", 9, lambda: lab.measured(28, BUDGET)),
        (f"bf16 whole step rows 28 budget {BUDGET}", 8, lambda: lab.whole_step(28, BUDGET)),
        ("bf16 rows 28 budget 0.3", 9, lambda: lab.measured(28, 0.3)),
        ("bf16 masters and AdamW", 4, lab.masters),
        ("bf16 rows 28 budget 0.7", 9, lambda: lab.measured(28, 0.7)),
        ("bf16 rows 28", 9, lambda: lab.measured(28)),
        ("bf16 rows 7", 9, lambda: lab.measured(7)),
        ("bf16 whole step rows 28 budget 0.7", 8, lambda: lab.whole_step(28, 0.7)),
        ("bf16 eager rows 7", 5, lambda: lab.measured(7, compiled=False)),
    ]


def adapted(lab: Lab) -> list[Experiment]:
    """The same of a LoRA; fp8 comes after it, on a model of its own."""
    return [
        ("lora bf16 rows 14", 12, lambda: lab.measured(14)),
        (f"lora bf16 rows 28 budget {BUDGET}", 12, lambda: lab.measured(28, BUDGET)),
    ]


def try_out(session: Session, work: Work, *, adapter: bool) -> None:
    """The experiments of one model, which is gone when this returns."""
    lab = Lab(session, work)
    if adapter:
        lab.adapt()
    for name, cost, run in (adapted if adapter else experiments)(lab):
        session.entry(name, cost, run)


def main() -> None:
    session = Session(command_line(__doc__ or ""), "lab")
    if not session.options.warm:
        session.measure_rate()
    work = Work()
    for beginning, part in (("bf16", 0.55), ("lora", 1.0)):
        session.limit = part * session.options.seconds
        if session.wants_some([beginning]):
            try_out(session, work, adapter=beginning == "lora")
            session.free()
    for dtype, word in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for compiled in (True, False):
            name = f"decoder {word} {'compiled' if compiled else 'eager'}"
            cost = 12 if compiled else 4
            session.entry(name, cost, lambda d=dtype, c=compiled: decoder(session, d, c))
    # rows are a multiple of 16, as fp8 products want the tokens of all of them to be
    session.entry("fp8 rows 16", 22, lambda: Lab(session, work).fp8(16), cuda=True)
    session.entry(f"plain rows 16 budget {BUDGET}", 18, lambda: Lab(session, work).measured(16, BUDGET))


if __name__ == "__main__":
    main()
