"""Describes the samples of a step that was refused, for a person to find the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.algorithm import Batch, Items, Tools


def suspects(
    micro_batches: Sequence[Items], losses: Sequence[Tensor], *, every: bool
) -> list[dict[str, Any]]:
    """A record for each item, but for those of weight 0, whose loss or weight is not finite, or for ``every``
    one.

    ``losses`` has the losses (n,) of each micro-batch. A record has ``sample`` (its position in the batch of
    all processes), ``loss`` and the items' scalar fields, such as ``sigma``.
    """
    rows = []
    for items, loss in zip(micro_batches, losses, strict=True):
        scalars = {name: values for name, values in items.fields.items() if values.ndim == 1}
        scalars = {"sample": scalars.pop("sample_index"), "loss": loss, **scalars}
        del scalars["prompt_index"]
        shown = (items.weight != 0) & (~(loss * items.weight).isfinite() | every)
        columns = [values[shown].tolist() for values in scalars.values()]
        rows += [dict(zip(scalars, values, strict=True)) for values in zip(*columns, strict=True)]
    return rows


def described(samples: Sequence[Mapping[str, Any]], batch: Batch, tools: Tools) -> list[dict[str, Any]]:
    """``samples``, records with a ``sample``, each with the ``id`` of its draws and with its prompt file's
    row or caption."""
    row_of = {place: row for row, place in enumerate(batch.sample_index.tolist())}
    return [
        {
            **(batch.metadata[row_of[sample["sample"]]] if batch.metadata else {}),
            "id": tools.draws.ids[row_of[sample["sample"]]],
            **sample,
        }
        for sample in samples
    ]


def finite(values: Tensor) -> bool:
    """Whether all ``values`` are finite."""
    return bool(torch.isfinite(values).all())
