"""Gives weights the names and shapes that they have in the single-file checkpoints of a model's authors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.weights.writing import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The place of one of diffusers' weights in a single-file checkpoint."""

    name: str
    """The weight's name there."""
    part: int = 0
    """Which of the :attr:`parts` it is, along the first axis."""
    parts: int = 1
    """How many parts of equal size one weight there has: 3 for queries, keys and values."""
    swapped: bool = False
    """Whether the two halves of the first axis have changed places: scale and shift."""
    sides: int = 0
    """Axes of size 1 that are added at the end: 2 for a linear layer that is a convolution there."""
    width: int = 1
    """How many of the parts it is, from :attr:`part` on."""


Places = Callable[[Collection[str]], Mapping[str, Place]]
"""The place of each of the names of a network's weights."""


@dataclass(frozen=True)
class SingleFile:
    """The layout of a model's single-file checkpoints: a function for each component that they hold."""

    transformer: Places
    autoencoder: Places
    transformer_prefix: str = "model.diffusion_model."
    autoencoder_prefix: str = "vae."
    kohya_module: str = "networks.lora_sd3"
    """The module of kohya's scripts that trains LoRAs of the model."""


def placed(entries: Mapping[str, Entry], places: Mapping[str, Place], prefix: str) -> dict[str, Entry]:
    """The weights ``entries`` of a network, by diffusers' names, as a single-file checkpoint has them.

    Raises ModelError where a weight has no place, or a part of one is missing.
    """
    if unknown := sorted(entries.keys() - places.keys()):
        raise ModelError(f"{len(unknown)} weights have no place in a single file: {', '.join(unknown[:3])}")
    joined: dict[str, dict[int, Entry]] = {}
    held: dict[str, int] = {}
    for name, entry in entries.items():
        place = places[name]
        joined.setdefault(place.name, {})[place.part] = _changed(entry, place)
        held[place.name] = held.get(place.name, 0) + place.width
    for name, place in places.items():
        if name in entries and held[place.name] != place.parts:
            raise ModelError(f"{place.name!r} needs {place.parts} parts, such as {name!r}")
    return {prefix + name: _concatenated([parts[i] for i in sorted(parts)]) for name, parts in joined.items()}


Layers = Mapping[str, "tuple[Tensor, Tensor]"]
"""Name of a layer -> A (rank, in) and B (out, rank) of its adapter, whose scale is 1."""


def fused_lora(layers: Layers, places: Places) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter ``layers``, by diffusers' names, for the layers of a single-file checkpoint.

    Adapters of the parts of one layer become one: its A has theirs below each other, and its B is theirs in
    blocks, so that its product is theirs below each other. Raises ModelError where a layer has no place.
    """
    import torch

    found = places([f"{name}.weight" for name in layers])
    if unknown := [name for name in layers if f"{name}.weight" not in found]:
        raise ModelError(f"{len(unknown)} layers have no place in a single file: {', '.join(unknown[:3])}")
    joined: dict[str, list[tuple[Place, Tensor, Tensor]]] = {}
    for name, (down, up) in layers.items():
        place = found[f"{name}.weight"]
        up = torch.cat(up.chunk(2)[::-1]) if place.swapped else up
        joined.setdefault(place.name.removesuffix(".weight"), []).append((place, down, up))
    fused = {}
    for name, parts in joined.items():
        ranks = [len(down) for _, down, _ in parts]
        place, _, first = parts[0]
        size = len(first) // place.width  # of one part
        whole = first.new_zeros(place.parts * size, sum(ranks), *first.shape[2:])
        for i, (place, _, up) in enumerate(parts):
            rows, column = place.part * size, sum(ranks[:i])
            whole[rows : rows + len(up), column : column + ranks[i]] = up
        fused[name] = torch.cat([down for _, down, _ in parts]), whole
    return fused


def _changed(entry: Entry, place: Place) -> Entry:
    import torch

    if place.swapped:
        entry = entry.then(lambda tensor: torch.cat(tensor.chunk(2)[::-1]))
    if place.sides:
        shape, read = (*entry.shape, *[1] * place.sides), entry.read
        entry = Entry(shape, entry.dtype, lambda: read().reshape(shape))
    return entry


def _concatenated(parts: list[Entry]) -> Entry:
    import torch

    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def renamed(names: Iterable[str], place_of: Callable[[str], Place | None]) -> dict[str, Place]:
    """The place of each of ``names`` whose layer has one, given the places of layers.

    A layer's name is that of its weights without ``.weight`` or ``.bias``.
    """
    places = {}
    for name in names:
        layer, dot, end = name.rpartition(".")
        if end not in ("weight", "bias"):
            layer, dot, end = name, "", ""
        if (place := place_of(layer)) is not None:
            sides = place.sides if end == "weight" else 0
            places[name] = replace(place, name=place.name + dot + end, sides=sides)
    return places
