"""Tries on one GPU what the engine does not do: linear layers in fp8, and a compiled decoder in bf16.

    OUT=runs/gpu python benchmarks/gpu_lab.py --seconds 90
    python benchmarks/gpu_lab.py --tiny

The transformer has SD3.5 Medium's shape and bf16 weights, its blocks compiled; measured is a forward-backward
at 512 px and 77 + 256 tokens, with linear layers in fp8 and without.
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

BUDGET = 0.5
"""Share of the activations that the compiler keeps."""
ROWS = 16
"""Fp8 products want the number of tokens of all rows to be a multiple of 16."""


class Lab:
    """The transformer in bf16, all of it trained."""

    def __init__(self, session: Session, work: Work) -> None:
        self.session, self.rows = session, 2 if session.options.tiny else ROWS
        self.it = bench(options_of(session))
        self.model: FlowModel = self.it.model
        self.flops = work.of(self.it, 1.0)
        self.transformer: nn.Module = self.model.transformer.to(torch.bfloat16)
        self.side = self.it.options.resolution
        self.condition = self.model.encode_prompts(["a red circle"])

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        device = self.session.device
        latents = torch.randn(self.rows, *self.model.latent_shape(self.side, self.side), device=device)
        condition = {name: t.repeat(self.rows, *[1] * (t.dim() - 1)) for name, t in self.condition.items()}
        return latents, torch.rand(self.rows, device=device), condition

    def forward_backward(self) -> Callable[[], None]:
        """The velocity's squared error, and its gradient, made anew."""
        given, target = self.inputs(), torch.randn(1, device=self.session.device)

        def run() -> None:
            self.zero_grad()
            (self.model.velocity(*given) - target).square().mean().backward()

        return run

    def measured(self) -> dict[str, Any]:
        """Time and memory of a forward-backward."""
        try:
            with compiled_blocks(self.transformer):
                run = self.forward_backward()
                figures = self.session.timed(run, self.rows, 3 * self.flops)
                return {"rows": self.rows, "budget": BUDGET, **figures}
        finally:
            self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.transformer.parameters():
            parameter.grad = None

    def fp8(self) -> dict[str, Any]:
        """The blocks' linear layers in fp8; cannot be undone, so it is the last."""
        swapped = sum(swap(block) for block in blocks(self.transformer))
        return {"linears": swapped, **self.measured()}


@contextmanager
def compiled_blocks(transformer: nn.Module) -> Iterator[None]:
    """Within the block the transformer's blocks are compiled, and keep BUDGET of their activations."""
    from torch._functorch import config

    before, config.activation_memory_budget = config.activation_memory_budget, BUDGET
    # dynamo would go on with what it compiled under another budget
    torch._dynamo.reset()
    for block in blocks(transformer):
        block.compile(**OPTIONS)
    try:
        yield
    finally:
        config.activation_memory_budget = before
        for block in blocks(transformer):
            block._compiled_call_impl = None


def decoder(session: Session, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Images a second of the autoencoder's decoder, channels last, 4 at a time."""
    options = options_of(session)
    vae = model_of(options, 16, session.device).pipeline.vae.to(dtype, memory_format=torch.channels_last)
    vae.eval().requires_grad_(False)
    side = options.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(4, vae.config.latent_channels, side, side, device=session.device, dtype=dtype)
    latents = latents.to(memory_format=torch.channels_last)
    decode = torch.compile(vae.decode, **OPTIONS) if compiled else vae.decode
    with torch.no_grad():
        return session.timed(lambda: decode(latents, return_dict=False), 4)


def main() -> None:
    session = Session(command_line(__doc__ or ""), "lab")
    session.measure_rate()
    work = Work()
    session.entry("plain rows", 15, lambda: Lab(session, work).measured())
    session.entry("fp8 rows", 20, lambda: Lab(session, work).fp8(), cuda=True)
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for compiled in (True, False):
            name = f"decoder {word} {'compiled' if compiled else 'eager'}"
            cost = 12 if compiled else 4
            session.entry(name, cost, lambda d=dtype, c=compiled: decoder(session, d, c))


if __name__ == "__main__":
    main()
