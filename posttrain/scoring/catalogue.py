"""Which rewards are there, what does each need, and is it here?"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RewardError
from posttrain.recipe.variants import AnyReward
from posttrain.reward import Reward
from posttrain.support.paths import is_path
from posttrain.support.spelling import meant
from posttrain.support.wording import short
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from rich.text import Text

assert AnyReward is not None  # importing it has registered every reward


@dataclass(frozen=True)
class Source:
    """Where one set of a reward's weights comes from by default."""

    field: str
    repo: str
    weights: Weights


def kinds() -> dict[str, type[Reward]]:
    """Every reward by name, in alphabetical order."""
    return {name: kind for name, kind in sorted(Reward.variants.items()) if issubclass(kind, Reward)}


def kind(name: str) -> type[Reward]:
    """The reward of that name. Raises RewardError where there is none."""
    if name not in (known := kinds()):
        raise RewardError(f"no reward {name!r}{meant(name, known)}; there are {', '.join(known)}")
    return known[name]


def sources(reward: type[Reward]) -> list[Source]:
    """What ``posttrain rewards fetch`` would get."""
    return [
        Source(field, reward.model_fields[field].default, weights)
        for field, weights in reward.weights.items()
    ]


def missing(reward: type[Reward]) -> list[str]:
    """What has to be installed or fetched before the reward can be used."""
    absent = [package for package in reward.requires if importlib.util.find_spec(package) is None]
    words = [f"{', '.join(absent)} (pip install 'posttrain[rewards]')"] if absent else []
    if any(source.weights.local(source.repo) is None for source in sources(reward)):
        words.append(f"posttrain rewards fetch {reward.model_fields['type'].default}")
    return words


def fetch(name: str) -> Iterator[tuple[Source, Path]]:
    """Fetch each of a reward's weights, in turn. Raises RewardError, also where there is nothing to fetch."""
    found = sources(kind(name))
    if not found:
        having = ", ".join(other for other, reward in kinds().items() if reward.weights)
        raise RewardError(f"{name} needs no weights from a hub; those that do: {having}")
    for source in found:
        if is_path(source.repo, hub=True):
            raise RewardError(f"{name}: {source.field} is the local copy {source.repo!r}; nothing to fetch")
        yield source, source.weights.fetch(source.repo)


def listing() -> Text:
    """Every reward with its range and whether all that it needs is here, its weights below it."""
    from rich.text import Text

    lines = []
    for name, reward in kinds().items():
        lacking = "; ".join(missing(reward))
        low, high = reward.range
        lines.append(
            Text.assemble(
                (f"{name:<24}", "bold"),
                f"{low:>6.4g} to {high:<6.4g}  ",
                (f"missing: {lacking}", "yellow") if lacking else ("ready", "green"),
            )
        )
        for source in sources(reward):
            weights = source.weights
            words = f"    {source.repo:<48} {short(weights.size, 'B'):>8}  {weights.licence}"
            lines.append(Text(words, "dim"))
    return Text("\n").join(lines)
