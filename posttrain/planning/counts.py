"""Counts the FLOPs and bytes of a model's work on images of one size, and remembers them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from posttrain.condition import Condition
from posttrain.errors import PosttrainError
from posttrain.model import EncoderName
from posttrain.planning.footprint import flops, held_by
from posttrain.planning.profile import Profile
from posttrain.planning.sizes import Outline
from posttrain.policy.activations import checkpoint_blocks

if TYPE_CHECKING:
    from torch import nn

    from posttrain.model import DtypeName, FlowModel, Model
    from posttrain.planning.store import Store
    from posttrain.policy.activations import Checkpointing
    from posttrain.policy.tuning import Tune

Work = Literal["forward", "decode", "encode", "text"]
META = torch.device("meta")
Size = tuple[int, int]
"""(height, width) of images in pixels."""
PRIMES = (1009, 1013, 1019, 1021)
ENCODED = 8
"""Rows whose encoding is counted at a time. Models may fill up each call of an encoder to so many."""
T = TypeVar("T")


class Counts:
    """The FLOPs and peak bytes of one model, each counted once, or read from a ``store``."""

    def __init__(self, model: Model, *, cuda: bool, store: Store | None = None) -> None:
        self.model, self.cuda, self.store = model, cuda, store
        self._counted: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], count: Callable[[], T]) -> T:
        """The result of ``count``, which is called once for each ``key``."""
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def _stored(
        self,
        key: tuple[Any, ...],
        count: Callable[[], T],
        load: Callable[[Any], T],
        dump: Callable[[T], Any] = lambda value: value,
    ) -> T:
        """As :meth:`once`, but what the store has is not counted. ``key`` is of texts and numbers; ``dump``
        makes JSON values of a count, and ``load`` reads them."""

        def found() -> T:
            if self.store is None:
                return count()
            stored = self.store.get(key, load)
            return self.store.put(key, count(), dump) if stored is None else stored

        return self.once(key, found)

    def outline(self, tune: Tune | None = None, lowered: torch.dtype | None = None) -> FlowModel:
        """The model without weights on the meta device, as loaded, or as ``tune`` trains it, with the
        transformer's weights ``lowered`` to a precision.

        Raises PosttrainError if its shape is unknown. It is never in the store: code that can do with a
        count of it should, since building it takes seconds."""
        dtype: DtypeName = self.model.frozen_dtype() if tune is not None and tune.type != "full" else "fp32"

        def built() -> FlowModel:
            if lowered is not None:
                outline = _with_own_transformer(self.outline(tune))
            elif tune is not None and dtype == "fp32":
                outline = _with_own_transformer(self.outline())
            else:
                outline = self.model.outline(dtype, META)
            if outline is None:
                raise PosttrainError(
                    "a plan cannot count this model: it is not on this machine and posttrain does not know "
                    "its shape (download it first, or give a local folder), or it looks into tensors while "
                    "it works, which have no values in a plan"
                )
            if tune is not None and lowered is None:
                tune.apply(outline.transformer, 0)
            for parameter in outline.transformer.parameters() if lowered is not None else ():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(lowered)
            return outline

        return self.once(("outline", dtype, tune and tune.counted_as(), lowered), built)

    def shape(self, tune: Tune | None = None) -> Outline:
        """The transformer's parameters, as loaded in float32, or as ``tune`` trains them."""
        return self._stored(
            ("shape", tune and tune.counted_as()),
            lambda: Outline.from_module(self.outline(tune).transformer),
            Outline.from_json,
            Outline.as_json,
        )

    def encoder_bytes(self) -> dict[EncoderName, int]:
        """Bytes of the weights of each encoder."""

        def count(encoder: EncoderName) -> int:
            modules = self.outline().encoder_modules(encoder)
            return sum(p.nbytes for module in modules for p in module.parameters())

        names: tuple[EncoderName, ...] = ("prompts", "images")
        return {name: self._stored(("encoder", name), lambda name=name: count(name), int) for name in names}

    def bytes_at_work(self, encoder: EncoderName) -> int:
        """Bytes that an encoder which rests has on the device while it works."""
        return self._stored(("at work", encoder), lambda: self.outline().bytes_at_work(encoder), int)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image of ``size``."""

        def read(values: Any) -> tuple[int, int, int]:
            channels, height, width = map(int, values)
            return channels, height, width

        return self._stored(("latent shape", size), lambda: self.outline().latent_shape(*size), read)

    def condition_bytes(self) -> int:
        """Bytes of the condition of one prompt."""
        return self._stored(
            ("condition",), lambda: sum(tensor.nbytes for tensor in self.condition(1).values()), int
        )

    def flops(self, work: Work, size: Size) -> float:
        """FLOPs of ``work`` on one row: the latents or pixels of one image, or one prompt.

        Encodings are counted ENCODED at a time: a model may compute as much for fewer."""
        rows = ENCODED if work in ("encode", "text") else 1
        size = (0, 0) if work == "text" else size

        def counted() -> float:
            outline = self.outline()
            return flops(self._call(outline, work, size, rows), outline.transformer) / rows

        return self._stored(("flops", work, size), counted, float)

    def memory(
        self,
        work: Literal["training", "forward"],
        size: Size,
        tune: Tune | None = None,
        autocast: torch.dtype | None = None,
        checkpointing: Checkpointing = "off",
        lowered: torch.dtype | None = None,
    ) -> Profile:
        """What ``work`` on any number of images of ``size`` holds, without the weights and their float32
        gradients.

        It computes under ``autocast``, or with weights that are ``lowered``, whose gradients count."""
        mode = checkpointing if work == "training" else "off"

        def counted() -> Profile:
            outline, training = self.outline(tune, lowered), work == "training"
            checkpoint_blocks(outline.transformer, mode)
            for parameter in outline.transformer.parameters():
                parameter.grad = None
                if parameter.requires_grad and training and lowered is None:
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
            return held.profile()

        precision = str(autocast) if lowered is None else f"lowered {lowered}"
        key = ("memory", work, size, tune and tune.counted_as(), precision, mode, self.cuda)
        return self._stored(key, counted, Profile.from_json, Profile.as_json)

    def autoencoder(self, work: Literal["encode", "decode"], size: Size, images: int) -> int:
        """Peak bytes of encoding or decoding a batch of ``images``; the model may split the batch."""

        def counted() -> int:
            outline = self.outline()
            return held_by(self._call(outline, work, size, images), outline.transformer).peak()

        return self._stored((work, size, images), counted, int)

    def text(self, prompts: int) -> int:
        """Peak bytes of encoding ``prompts``, if the model encodes a few at a time, keeps their conditions,
        and joins them at the end."""

        def counted() -> int:
            outline = self.outline()
            return held_by(self._call(outline, "text", (0, 0), 1), outline.transformer).peak()

        one, kept = self._stored(("text",), counted, int), prompts * self.condition_bytes()
        return max(one + kept, 2 * kept)

    def condition(self, rows: int) -> Condition:
        """The condition of ``rows`` prompts, on the meta device."""
        with torch.no_grad():
            encoded = self.once(("condition tensors",), lambda: self.outline().encode_prompts(["a"]))
        return {name: tensor.detach().expand(rows, *tensor.shape[1:]) for name, tensor in encoded.items()}

    def _call(
        self, outline: FlowModel, work: Work | Literal["training"], size: Size, rows: int
    ) -> Callable[[], Tensor]:
        if work == "text":
            return lambda: next(iter(outline.encode_prompts(["a"] * rows).values()))
        latents = torch.empty(rows, *outline.latent_shape(*size), device=META)
        if work == "decode":
            return lambda: outline.decode(latents)
        if work == "encode":
            pixels = torch.empty(rows, 3, *size, device=META)
            return lambda: outline.encode_images(pixels, latents)
        sigma, table = torch.empty(rows, device=META), self.condition(rows)
        # each forward gathers its prompts' rows from the batch's table, which copies them
        return lambda: outline.velocity(latents, sigma, {k: v.clone() for k, v in table.items()})


def _with_own_transformer(outline: FlowModel) -> FlowModel:
    """``outline`` with a copy of its transformer, which takes no time beside building the encoders again."""
    copied = copy.copy(outline)
    copied.transformer = copied.module = copy.deepcopy(outline.transformer)
    return copied


def _prime(module: nn.Module) -> int:
    """A number of rows that is a prime and no factor of any weight's size, as Held wants it."""
    sizes = {tensor.numel() for tensor in (*module.parameters(), *module.buffers())}
    return next(prime for prime in PRIMES if all(size % prime for size in sizes))
