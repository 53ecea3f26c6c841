"""Defines what an algorithm takes and gives: a batch, weighted items, their losses and samples' scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.condition import Condition, Conditions

RECORDED = {
    "step", "time", "loss", "grad_norm", "skipped_steps", "refused_steps", "learning_rate",
    "images_per_second", "forward_equivalents",
}  # fmt: skip
"""What the engine itself records of a step. An algorithm's metrics have other names."""


@dataclass(frozen=True)
class Batch:
    """n samples of the data set, each with its prompt."""

    latents: Tensor
    """(n, c, h, w) float32 clean latents, scaled as the transformer takes them. A batch of prompts has no
    images yet: then a tensor on torch's meta device, which has the shape only."""
    prompt_index: Tensor
    """(n,) int64: each sample's row in ``conditions``."""
    conditions: Conditions
    """The encoded prompts; row 0 is the empty prompt."""
    metadata: Sequence[Mapping[str, Any]] = ()
    """n rows, each with all that the file of prompts or images says of the sample, ``prompt`` (the caption)
    included; or empty."""
    group: Tensor | None = None
    """(n,) int64: equal for samples of one prompt. None for algorithms that need no rewards."""
    sample_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(n,) int64: each sample's position in the batch of all processes; 0 to n - 1 by default. -1 is a
    filler, which gives every process the same number of samples."""
    total: int = 0
    """Number of samples of all processes without fillers; n by default."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (n, ...): what else a sample has; a pair has ``rejected``, the other image's latents."""

    def __post_init__(self) -> None:
        if not len(self.sample_index):
            object.__setattr__(self, "sample_index", torch.arange(len(self), device=self.prompt_index.device))
        if not self.total:
            object.__setattr__(self, "total", len(self))

    def __len__(self) -> int:
        return len(self.prompt_index)

    def take(self, index: slice) -> Batch:
        """The samples at ``index``, with the same conditions."""
        return replace(
            self,
            latents=self.latents[index],
            prompt_index=self.prompt_index[index],
            metadata=self.metadata[index],
            group=None if self.group is None else self.group[index],
            sample_index=self.sample_index[index],
            fields={name: values[index] for name, values in self.fields.items()},
        )


@dataclass(frozen=True)
class Items:
    """n training items: named tensors whose first axis is n.

    A field is read as an attribute: ``items.latents``. Two fields are required: ``prompt_index`` (n,), the
    item's row in ``conditions``, and ``sample_index`` (n,), the index of the item's sample in the batch.
    Raises ValueError if one is missing, if first axes differ, if a field has the name of an attribute, or if
    anything is no tensor.
    """

    weight: Tensor
    """(n,) The weight of each item's loss. The update divides by the sum of all processes' weights. Items of
    weight 0 are not computed."""
    fields: dict[str, Tensor]
    """Name -> (n, ...)."""
    conditions: Conditions
    """The batch's encoded prompts; row 0 is the empty prompt."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """What to record of the batch: scalars, and vectors (n,), which become histograms. Their names are none
    of those that the engine records, such as ``loss`` and ``time``."""

    def __post_init__(self) -> None:
        for name, value in {"weight": self.weight, **self.fields, **self.metrics}.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"items: {name!r} is of type {type(value).__name__}, not a tensor")
        _check_metrics(self.metrics)
        for name, value in self.metrics.items():
            if value.ndim > 1:
                shape = tuple(value.shape)
                raise ValueError(f"items: the metric {name!r} has the shape {shape}, not () or (n,)")
        if missing := [name for name in ("prompt_index", "sample_index") if name not in self.fields]:
            raise ValueError(
                f"items lack {' and '.join(map(repr, missing))}; they have {sorted(self.fields)}"
            )
        if hidden := sorted(name for name in self.fields if name in vars(self) or hasattr(Items, name)):
            raise ValueError(
                f"items: a field cannot be called {hidden[0]!r}, which items have as an attribute"
            )
        if self.weight.ndim != 1:
            raise ValueError(f"items: weight has the shape {tuple(self.weight.shape)}, not (n,)")
        named = {"weight": self.weight, **self.fields}
        lengths = {name: (*tensor.shape, "none")[0] for name, tensor in named.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"items: weight and every field must have the same length; they have {listed}")

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"no field {name!r}; these items have {sorted(self.fields)}") from None

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def condition(self) -> Condition:
        """The condition of each item, gathered from the batch's."""
        return self.conditions.rows(self.fields["prompt_index"])

    def take(self, index: Tensor | slice) -> Items:
        """The items at ``index``, with the same conditions."""
        return replace(self, weight=self.weight[index], fields={k: v[index] for k, v in self.fields.items()})

    def split(self, size: int) -> Iterator[Items]:
        """Consecutive slices of at most ``size`` items."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def parts_by_sample(self, count: int) -> Iterator[Items]:
        """The items in ``count`` parts: part i has the items of samples whose index is i modulo ``count``.

        Samples of one prompt are neighbours, so they spread over all parts. A sample is in the same part on
        any number of processes.
        """
        for i in range(count):
            yield self.take(self.fields["sample_index"] % count == i) if count > 1 else self

    @property
    def nbytes(self) -> int:
        """Bytes of weight and fields; the shared conditions are not counted."""
        return sum(tensor.nbytes for tensor in (self.weight, *self.fields.values()))

    @staticmethod
    def cat(parts: Sequence[Items]) -> Items:
        """The items of all ``parts`` in order. All must have the same field names and the same conditions."""
        fields = {k: torch.cat([p.fields[k] for p in parts]) for k in parts[0].fields}
        return Items(torch.cat([p.weight for p in parts]), fields, parts[0].conditions)


@dataclass(frozen=True)
class Losses:
    """The losses of n items; :meth:`Algorithm.loss` returns them."""

    per_item: Tensor
    """(n,) The loss of each item, neither weighted nor averaged; the update does both."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Name -> (n,) values to record, by names that the engine does not record. Their mean is taken with the
    items' weights."""

    def __post_init__(self) -> None:
        _check_metrics(self.metrics)


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raise ValueError if a metric would take the place of what the engine records."""
    if taken := sorted(RECORDED & metrics.keys()):
        raise ValueError(f"a metric cannot be called {taken[0]!r}, which the engine records of every step")


@dataclass(frozen=True)
class Verdict:
    """The scores of n samples."""

    rewards: dict[str, Tensor]
    """Reward -> (n,) float32."""
    details: dict[str, Tensor]
    """``reward/detail`` -> (n,) float32; recorded only."""

    @staticmethod
    def cat(parts: Sequence[Verdict]) -> Verdict:
        """The scores of all samples, in order. All parts have equal details."""
        return Verdict(
            {name: torch.cat([p.rewards[name] for p in parts]) for name in parts[0].rewards},
            {name: torch.cat([p.details[name] for p in parts]) for name in parts[0].details},
        )
