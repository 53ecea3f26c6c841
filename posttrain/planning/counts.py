"""Counts the FLOPs and bytes of a model's work on images of one size, and remembers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from posttrain.condition import Condition
from posttrain.errors import PosttrainError
from posttrain.planning.footprint import flops, peak_bytes
from posttrain.policy.activations import checkpoint_blocks

if TYPE_CHECKING:
    from posttrain.model import DtypeName, FlowModel, Model
    from posttrain.policy.activations import Checkpointing
    from posttrain.policy.tuning import Tune

Work = Literal["training", "forward", "decode", "encode", "text"]
META = torch.device("meta")
Size = tuple[int, int]
"""(height, width) of images in pixels."""
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Peak bytes as a linear function of the number of rows."""

    fixed: float
    each: float

    def at(self, rows: int) -> float:
        """The bytes for so many rows; 0 for none."""
        return self.fixed + self.each * rows if rows else 0.0


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
        return self.once(("flops", work, size), lambda: flops(self._call(self.outline(), work, size, 1)))

    def memory(
        self,
        work: Work,
        size: Size,
        tune: Tune | None = None,
        autocast: torch.dtype | None = None,
        checkpointing: Checkpointing = "off",
    ) -> Line:
        """Peak bytes of ``work`` on images of ``size``, without the weights and their gradients."""
        mode = checkpointing if work == "training" else "off"

        def counted() -> Line:
            outline, training = self.outline(tune), work == "training"
            checkpoint_blocks(outline.transformer, mode)
            for parameter in outline.transformer.parameters():
                if parameter.requires_grad and training:
                    parameter.grad = torch.empty_like(parameter)
            precision = autocast if work in ("training", "forward") else None
            one, two = (
                peak_bytes(
                    self._call(outline, work, size, rows),
                    backward=training,
                    autocast=precision,
                    wide=self.cuda,
                )
                for rows in (1, 2)
            )
            checkpoint_blocks(outline.transformer, "off")
            return Line(2 * one - two, two - one)

        key = (work, size, tune and tune.model_dump_json(), autocast, mode)
        return self.once(key, counted)

    def autoencoder(self, work: Literal["encode", "decode"], size: Size, images: int) -> int:
        """Peak bytes of encoding or decoding a batch of ``images``; the model may split the batch."""
        call = self._call(self.outline(), work, size, images)
        return self.once((work, size, images), lambda: peak_bytes(call))

    def condition(self, rows: int) -> Condition:
        """The condition of ``rows`` prompts, on the meta device."""
        with torch.no_grad():
            encoded = self.once(("condition",), lambda: self.outline().encode_prompts(["a"]))
        return {name: tensor.detach().expand(rows, *tensor.shape[1:]) for name, tensor in encoded.items()}

    def _call(self, outline: FlowModel, work: Work, size: Size, rows: int) -> Callable[[], Tensor]:
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
