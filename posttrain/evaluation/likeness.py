"""Tells what keeps evaluations from being compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.evaluation.card import differing

ALIKE = {
    "prompts": "on other prompts",
    "sampler": "with other sampling settings",
    "scorers": "by other rewards",
}
"""Entry of the result card that all stages have in common -> how a stage was evaluated if it differs."""

FREE = "sampler.batch_size"
"""Changes no image."""


def other_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The components of the base that differ between two result cards; none if a card does not tell them."""
    bases = [card.get("model", {}).get("base") or {} for card in (one, other)]
    if not all(bases):
        return []
    return sorted(name for name in {*bases[0], *bases[1]} if bases[0].get(name) != bases[1].get(name))


def unlike(evaluations: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each evaluation that may not be compared with the first one.

    ``evaluations`` has the result card, or nothing yet, of each stage by name.
    """
    measured = [(name, card) for name, card in evaluations.items() if card]
    for name, card in measured[1:]:
        first, base = measured[0]
        lines = [line for line in differing(base, card) if not line.startswith(FREE)]
        faults = [words for entry, words in ALIKE.items() if any(line.startswith(entry) for line in lines)]
        if components := other_base(base, card):
            faults.append(f"on another base model ({', '.join(components)} differ)")
        if faults:
            yield f"{name} was evaluated {' and '.join(faults)} than {first}: do not compare their scores."
