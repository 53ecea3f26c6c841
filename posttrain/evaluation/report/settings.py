"""Says in a few lines how something was evaluated, and with what it ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.support.wording import counted


def evaluation_lines(card: Mapping[str, Any]) -> Iterator[str]:
    """The prompts and the sampler of a result card, which may be empty."""
    if sampler := card.get("sampler"):
        told = ", ".join(f"{name} {value}" for name, value in sampler.items())
        yield f"Evaluated on {counted(card.get('prompts', {}).get('rows', 0), 'prompt')}: {told}"


def model_lines(card: Mapping[str, Any]) -> Iterator[str]:
    """The model of a result card."""
    if model := card.get("model"):
        told = (f"{name} {model[name]}" for name in ("source", "weights", "sha256") if model.get(name))
        yield f"Model: {', '.join(told)}"


def environment_lines(environment: Mapping[str, Any]) -> Iterator[str]:
    """The content of ``environment.json``, which may lack anything."""
    told = {name: environment[name] for name in ("device", "seed", "started") if name in environment}
    if told:
        yield "Ran with " + ", ".join(f"{name} {value}" for name, value in told.items())
    if versions := environment.get("versions"):
        yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
