"""What do the parts of a model cost on images of a size? Counted once each, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from posttrain.condition import Condition
from posttrain.errors import PosttrainError
from posttrain.planning.footprint import flops, peak_bytes

if TYPE_CHECKING:
    from posttrain.model import DtypeName, FlowModel, Model
    from posttrain.tuning import Tune

Work = Literal["training", "forward", "decode", "encode", "text"]
META = torch.device("meta")


@dataclass(frozen=True)
class Line:
    """Bytes at the peak, as a function of rows."""

    fixed: float
    each: float

    def at(self, rows: int) -> float:
        """The bytes of ``rows`` rows."""
        return self.fixed + self.each * rows if rows else 0.0


class Counts:
    """The FLOPs and bytes of one model, in training and at rest."""

    def __init__(self, model: Model, *, cuda: bool) -> None:
        self.model, self.cuda = model, cuda
        self._found: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], count: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = count()
        return self._found[key]

    def outline(self, tune: Tune | None = None) -> FlowModel:
        """The model on the meta device, at rest, or as ``tune`` trains it.

        Raises PosttrainError where its shape is unknown."""
        dtype: DtypeName = self.model.frozen_dtype() if tune is not None and tune.type != "full" else "fp32"

        def built() -> FlowModel:
            if (outline := self.model.outline(dtype, META)) is None:
                raise PosttrainError(
                    "the model is not on this machine and its shape is not among the published ones known "
                    "here, so there is nothing to count: fetch it first, or give a local folder"
                )
            if tune is not None:
                tune.apply(outline.transformer, 0)
            return outline

        return self._once(("outline", dtype, tune and tune.model_dump_json()), built)

    def flops(self, work: Work, side: int) -> int:
        """FLOPs of one row: one image's latents or pixels, or one prompt."""
        return self._once(("flops", work, side), lambda: flops(self._call(self.outline(), work, side, 1)))

    def memory(
        self,
        work: Work,
        side: int,
        tune: Tune | None = None,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
    ) -> Line:
        """Peak bytes of ``work`` on images of ``side`` pixels, beside the weights and their gradients."""

        def counted() -> Line:
            outline, training = self.outline(tune), work == "training"
            if training and checkpointing:
                outline.transformer.enable_gradient_checkpointing()
            for parameter in outline.transformer.parameters():
                if parameter.requires_grad and training:
                    parameter.grad = torch.empty_like(parameter)
            precision = autocast if work in ("training", "forward") else None
            one, two = (
                peak_bytes(
                    self._call(outline, work, side, rows),
                    backward=training,
                    autocast=precision,
                    wide=self.cuda,
                )
                for rows in (1, 2)
            )
            if training and checkpointing:
                outline.transformer.disable_gradient_checkpointing()
            return Line(2 * one - two, two - one)

        key = (work, side, tune and tune.model_dump_json(), autocast, work == "training" and checkpointing)
        return self._once(key, counted)

    def autoencoder(self, work: Literal["encode", "decode"], side: int, images: int) -> int:
        """Peak bytes of encoding or decoding ``images`` of ``side`` pixels, which may be done in parts."""
        call = self._call(self.outline(), work, side, images)
        return self._once((work, side, images), lambda: peak_bytes(call))

    def condition(self, rows: int) -> Condition:
        """``rows`` encoded prompts."""
        with torch.no_grad():
            found = self._once(("condition",), lambda: self.outline().encode_prompts(["a"]))
        return {name: tensor.detach().expand(rows, *tensor.shape[1:]) for name, tensor in found.items()}

    def _call(self, outline: FlowModel, work: Work, side: int, rows: int) -> Callable[[], Tensor]:
        latents = torch.empty(rows, *outline.latent_shape(side, side), device=META)
        if work == "decode":
            return lambda: outline.decode(latents)
        if work == "encode":
            pixels = torch.empty(rows, 3, side, side, device=META)
            return lambda: outline.encode_images(pixels, latents)
        if work == "text":
            return lambda: outline.encode_prompts(["a"] * rows)["encoder_hidden_states"]
        sigma, table = torch.empty(rows, device=META), self.condition(rows)
        # the rows of a batch's table are gathered, so each forward has its own copy
        return lambda: outline.velocity(latents, sigma, {k: v.clone() for k, v in table.items()})
