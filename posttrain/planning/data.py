"""Finds what is known of a stage's data before a run, once for each plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.data.family import Facts

if TYPE_CHECKING:
    from posttrain.data.family import Data
    from posttrain.planning.counts import Counts


def known(data: Data, counts: Counts, name: str) -> Facts:
    """What is known of the ``data`` of stage ``name``. Raises PosttrainError if no size is known."""
    return counts.once(("data", data.type, data.model_dump_json()), lambda: data.facts(f"stages.{name}.data"))
