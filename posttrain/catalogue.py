"""Which rewards are there, what does each need, and is it here?"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RewardError
from posttrain.recipe import AnyReward
from posttrain.reward import Reward
from posttrain.spelling import meant
from posttrain.weights import Weights, is_path

if TYPE_CHECKING:
    from rich.table import Table

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
        if is_path(source.repo):
            raise RewardError(f"{name}: {source.field} is the local copy {source.repo!r}; nothing to fetch")
        yield source, source.weights.fetch(source.repo)


def table() -> Table:
    """Every reward: its range, its weights and whether all that it needs is here."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for column in ("reward", "range", "weights", "size", "licence", "here?"):
        shown.add_column(
            column,
            justify="right" if column == "size" else "left",
            overflow="fold",
            no_wrap=column in ("reward", "size"),
        )
    for name, reward in kinds().items():
        lacking = missing(reward)
        weights = [(s.repo, size(s.weights.size), s.weights.licence) for s in sources(reward)]
        here = "yes" if not lacking else "no: " + "; ".join(lacking)
        reach = "{:.4g} to {:.4g}".format(*reward.range)
        for i, cells in enumerate(weights or [("none", "", "")]):
            # one row for each set of weights, so that what belongs together stays so when cells wrap
            shown.add_row(*((f"[bold]{name}[/bold]", reach) if i == 0 else ("", "")), *cells, here)
            here = ""
    return shown


def size(number: int) -> str:
    """A number of bytes as a person reads it, in units of 1000."""
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
