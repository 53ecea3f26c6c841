"""Lists the rewards, the packages and weights that each needs, and whether they are on this machine."""

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
from posttrain.support.plugins import how_to_install, missing_type, package_of
from posttrain.support.spelling import meant
from posttrain.support.wording import short
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from rich.text import Text

assert AnyReward is not None  # importing it registers every reward


@dataclass(frozen=True)
class Source:
    """The default repository of one set of a reward's weights."""

    field: str
    repo: str
    weights: Weights


def every_reward() -> dict[str, type[Reward]]:
    """Every reward class by name, in alphabetical order."""
    return {name: reward for name, reward in sorted(Reward.variants.items()) if issubclass(reward, Reward)}


def reward_named(name: str) -> type[Reward]:
    """The reward class of that name. Raises RewardError if there is none."""
    if name not in (known := every_reward()):
        plugins = missing_type("posttrain.rewards", name)
        raise RewardError(f"no reward {name!r}{meant(name, known)}; there are {', '.join(known)}{plugins}")
    return known[name]


def sources(reward: type[Reward]) -> list[Source]:
    """The repositories that ``posttrain rewards fetch`` downloads from."""
    return [
        Source(field, reward.model_fields[field].default, weights)
        for field, weights in reward.weights.items()
    ]


def missing(reward: type[Reward]) -> list[str]:
    """The packages to install and the command to run before the reward can be used."""
    packages = [package for package in reward.requires if importlib.util.find_spec(package) is None]
    steps = [f"{', '.join(packages)} ({how_to_install(reward)})"] if packages else []
    if any(source.weights.local(source.repo) is None for source in sources(reward)):
        steps.append(f"posttrain rewards fetch {reward.model_fields['type'].default}")
    return steps


def fetch(name: str) -> Iterator[tuple[Source, Path]]:
    """Fetch the weights of the reward ``name``, one set after the other; yield each with its path.

    Raises RewardError, also if the reward has no weights to fetch.
    """
    to_fetch = sources(reward_named(name))
    if not to_fetch:
        with_weights = ", ".join(other for other, reward in every_reward().items() if reward.weights)
        raise RewardError(f"{name} needs no weights from a hub; those that do: {with_weights}")
    for source in to_fetch:
        if is_path(source.repo, hub=True):
            raise RewardError(f"{name}: {source.field} is the local copy {source.repo!r}; nothing to fetch")
        yield source, source.weights.fetch(source.repo)


def listing() -> Text:
    """A line for each reward with its range and what is missing; below it, a line for each of its weights."""
    from rich.text import Text

    lines = []
    for name, reward in every_reward().items():
        steps = "; ".join(missing(reward))
        low, high = getattr(reward, "range", (float("nan"), float("nan")))  # a plug-in's may lack it
        lines.append(
            Text.assemble(
                (f"{name:<24}", "bold"),
                f"{low:>6.4g} to {high:<6.4g}  ",
                (f"missing: {steps}", "yellow") if steps else ("ready", "green"),
                ""
                if (package := package_of("posttrain.rewards", name)) == "posttrain"
                else f"  from {package}",
            )
        )
        for source in sources(reward):
            weights = source.weights
            line = f"    {source.repo:<48} {short(weights.size, 'B'):>8}  {weights.licence}"
            lines.append(Text(line, "dim"))
    return Text("\n").join(lines)
