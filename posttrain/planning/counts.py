"""Counts the FLOPs and bytes of a model's work on images of one size, and remembers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from posttrain.condition import Condition
from posttrain.errors import PosttrainError
from posttrain.planning.footprint import flops, held_by
from posttrain.policy.activations import checkpoint_blocks

if TYPE_CHECKING:
    from torch import nn

    from posttrain.model import DtypeName, FlowModel, Model
    from posttrain.planning.held import Held
    from posttrain.policy.activations import Checkpointing
    from posttrain.policy.tuning import Tune

Work = Literal["forward", "decode", "encode", "text"]
META = torch.device("meta")
Size = tuple[int, int]
"""(height, width) of images in pixels."""
PRIMES = (1009, 1013, 1019, 1021)
T = TypeVar("T")


class Counts:
    """The FLOPs and peak bytes of one model, each counted once."""

    def __init__(self, model: Model, *, cuda: bool) -> None:
        self.model, self.cuda = model, cuda
        self._counted: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], count: Callable[[], T]) -> T:
        """The result of ``count``, which is called once for each ``key``."""
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def outline(self, tune: Tune | None = None) -> FlowModel:
        """The model without weights on the meta device, as loaded, or as ``tune`` trains it.

        Raises PosttrainError if its shape is unknown."""
        dtype: DtypeName = self.model.frozen_dtype() if tune is not None and tune.type != "full" else "fp32"

        def built() -> FlowModel:
            if (outline := self.model.outline(dtype, META)) is None:
                raise PosttrainError(
                    "the model is not on this machine, and posttrain does not know its shape, so it cannot "
                    "count: download the model first, or give a local folder"
                )
            if tune is not None:
                tune.apply(outline.transformer, 0)
            return outline

        return self.once(("outline", dtype, tune and tune.model_dump_json()), built)

    def flops(self, work: Work, size: Size) -> int:
        """FLOPs of ``work`` on one row: the latents or pixels of one image, or one prompt."""

        def counted() -> int:
            outline = self.outline()
            return flops(self._call(outline, work, size, 1), outline.transformer)

        return self.once(("flops", work, size), counted)

    def memory(
        self,
        work: Literal["training", "forward"],
        size: Size,
        tune: Tune | None = None,
        autocast: torch.dtype | None = None,
        checkpointing: Checkpointing = "off",
    ) -> Held:
        """What ``work`` on any number of images of ``size`` holds, without the weights and their
        gradients."""
        mode = checkpointing if work == "training" else "off"

        def counted() -> Held:
            outline, training = self.outline(tune), work == "training"
            checkpoint_blocks(outline.transformer, mode)
            for parameter in outline.transformer.parameters():
                if parameter.requires_grad and training:
                    parameter.grad = torch.empty_like(parameter)
            rows = _prime(outline.transformer)
            held = held_by(
                self._call(outline, work, size, rows),
                outline.transformer,
                rows=rows,
                backward=training,
                autocast=autocast,
                wide=self.cuda,
            )
            checkpoint_blocks(outline.transformer, "off")
            return held

        key = (work, size, tune and tune.model_dump_json(), autocast, mode)
        return self.once(key, counted)

    def autoencoder(self, work: Literal["encode", "decode"], size: Size, images: int) -> int:
        """Peak bytes of encoding or decoding a batch of ``images``; the model may split the batch."""
        outline = self.outline()
        call = self._call(outline, work, size, images)
        return self.once((work, size, images), lambda: held_by(call, outline.transformer).peak())

    def text(self, prompts: int) -> int:
        """Peak bytes of encoding ``prompts``, if the model encodes a few at a time, keeps their conditions,
        and joins them at the end."""
        outline = self.outline()
        call = self._call(outline, "text", (0, 0), 1)
        one = self.once(("text",), lambda: held_by(call, outline.transformer).peak())
        kept = prompts * sum(tensor.nbytes for tensor in self.condition(1).values())
        return max(one + kept, 2 * kept)

    def condition(self, rows: int) -> Condition:
        """The condition of ``rows`` prompts, on the meta device."""
        with torch.no_grad():
            encoded = self.once(("condition",), lambda: self.outline().encode_prompts(["a"]))
        return {name: tensor.detach().expand(rows, *tensor.shape[1:]) for name, tensor in encoded.items()}

    def _call(
        self, outline: FlowModel, work: Work | Literal["training"], size: Size, rows: int
    ) -> Callable[[], Tensor]:
        latents = torch.empty(rows, *outline.latent_shape(*size), device=META)
        if work == "decode":
            return lambda: outline.decode(latents)
        if work == "encode":
            pixels = torch.empty(rows, 3, *size, device=META)
            return lambda: outline.encode_images(pixels, latents)
        if work == "text":
            return lambda: outline.encode_prompts(["a"] * rows)["encoder_hidden_states"]
        sigma, table = torch.empty(rows, device=META), self.condition(rows)
        # each forward gathers its prompts' rows from the batch's table, which copies them
        return lambda: outline.velocity(latents, sigma, {k: v.clone() for k, v in table.items()})


def _prime(module: nn.Module) -> int:
    """A number of rows that is a prime and no factor of any weight's size, as Held wants it."""
    sizes = {tensor.numel() for tensor in (*module.parameters(), *module.buffers())}
    return next(prime for prime in PRIMES if all(size % prime for size in sizes))
