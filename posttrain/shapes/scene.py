"""Draws random scenes of coloured shapes, with captions and metadata.

Scenes have GenEval's six kinds of task, and prompts and metadata in its format (Ghosh et al. 2023,
arXiv:2310.11513). Coordinates are pixels of a 64 x 64 image, y pointing down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

SIZE = 64
SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
VOCABULARY = sorted(
    {"a", "photo", "of", "and", *SHAPES, *(s + "s" for s in SHAPES), *COLORS, *NUMBERS.values()}
    | {word for relation in RELATIONS for word in relation.split()}
)
"""Every word that a caption can contain."""
GAP = 3.0
"""Least distance in pixels between two shapes' bounding boxes, and between a shape and the border."""

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Thing:
    """One shape with its centre (x, y); ``size`` is the side of its bounding square."""

    kind: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Style:
    """The flaws of scenes and captions, as probabilities, and the range of sizes in pixels."""

    wrong_caption: float = 0.0
    """Probability of a caption with one wrong word or something left out."""
    clutter: float = 0.0
    """Probability of one or two small shapes that the caption does not mention."""
    tint: float = 0.0
    """Probability of a coloured background with a gradient instead of light grey."""
    sizes: tuple[float, float] = (14.0, 22.0)


STYLES = {
    "clean": Style(),
    "web": Style(wrong_caption=0.2, clutter=0.8, tint=0.5, sizes=(12.0, 24.0)),
}


@dataclass(frozen=True)
class Scene:
    """Shapes and background of one image, with its caption."""

    things: tuple[Thing, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    """RGB at the top and at the bottom."""
    metadata: Metadata
    """GenEval's metadata: tag, include, exclude, and the true prompt."""
    caption: str
    """The data set's caption. In the web style it is sometimes wrong."""


def sample_scene(rng: Generator, tag: str, style: Style) -> Scene:
    """A random scene for a task of kind ``tag``, in ``style``."""
    metadata = sample_task(rng, tag)
    while (things := _arranged(rng, metadata, style)) is None:
        pass
    caption = metadata["prompt"]
    if rng.random() < style.clutter:
        things = _cluttered(rng, things)
    if rng.random() < style.wrong_caption:
        caption = _flawed(rng, metadata)
    return Scene(tuple(things), _background(rng, style), metadata, caption)


def sample_task(rng: Generator, tag: str) -> Metadata:
    """GenEval-format metadata of a random task, with its prompt."""
    first, second = (str(s) for s in rng.permutation(SHAPES)[:2])
    color, other = (str(c) for c in rng.permutation(COLORS)[:2])
    if tag == "single_object":
        return _task(tag, [{"class": first, "count": 1}])
    if tag == "two_object":
        return _task(tag, [{"class": first, "count": 1}, {"class": second, "count": 1}])
    if tag == "counting":
        count = int(rng.integers(2, 5))
        exclude = [{"class": first, "count": count + 1}]
        return _task(tag, [{"class": first, "count": count}], exclude)
    if tag == "colors":
        return _task(tag, [{"class": first, "count": 1, "color": color}])
    if tag == "position":
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        # GenEval lists the object of reference first and names its index in the other's position
        return _task(
            tag, [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
        )
    if tag == "color_attr":
        return _task(
            tag, [{"class": first, "count": 1, "color": color}, {"class": second, "count": 1, "color": other}]
        )
    raise ValueError(f"no task kind {tag!r}; there are {', '.join(TASKS)}")


def prompt_of(include: Sequence[Metadata]) -> str:
    """The prompt that asks for what ``include`` lists, in GenEval's wording."""
    names = [_named(clause) for clause in include]
    if (position := include[-1].get("position")) is not None:
        return f"a photo of {names[-1]} {position[0]} {names[position[1]]}"
    return "a photo of " + " and ".join(names)


def _task(tag: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Metadata:
    row: Metadata = {"tag": tag, "include": include}
    if exclude:
        row["exclude"] = exclude
    return {**row, "prompt": prompt_of(include)}


def _named(clause: Metadata) -> str:
    color = f"{clause['color']} " if "color" in clause else ""
    if clause["count"] == 1:
        return f"a {color}{clause['class']}"
    return f"{NUMBERS[clause['count']]} {color}{clause['class']}s"


def _arranged(rng: Generator, metadata: Metadata, style: Style) -> list[Thing] | None:
    """Shapes placed as the task asks, or None if this attempt failed."""
    things: list[Thing] = []
    total = sum(clause["count"] for clause in metadata["include"])
    largest = min(style.sizes[1], 24.0 - 2.5 * max(total - 1, 0))
    for clause in metadata["include"]:
        for _ in range(clause["count"]):
            color = clause.get("color") or str(rng.choice(COLORS))
            thing = _placed(rng, things, clause["class"], color, (min(style.sizes[0], largest - 2), largest))
            if thing is None:
                return None
            things.append(thing)
    position = metadata["include"][-1].get("position")
    if position is not None and not _clearly(position[0], things[-1], things[position[1]]):
        return None
    return things


def _clearly(relation: str, a: Thing, b: Thing) -> bool:
    """Whether the relation is obvious: the offset is within 29 degrees of the relation's axis."""
    dx, dy = RELATIONS[relation]
    along, across = (a.x - b.x) * dx + (a.y - b.y) * dy, (a.x - b.x) * dy + (a.y - b.y) * dx
    return along > 0 and abs(across) < 0.55 * along


def _placed(
    rng: Generator, others: Sequence[Thing], kind: str, color: str, sizes: tuple[float, float]
) -> Thing | None:
    for _ in range(30):
        size = float(rng.uniform(*sizes))
        margin = size / 2 + GAP
        x, y = (float(v) for v in rng.uniform(margin, SIZE - margin, 2))
        if all(max(abs(x - o.x), abs(y - o.y)) >= (size + o.size) / 2 + GAP for o in others):
            return Thing(kind, color, x, y, size)
    return None


def _cluttered(rng: Generator, things: list[Thing]) -> list[Thing]:
    for _ in range(int(rng.integers(1, 3))):
        extra = _placed(rng, things, str(rng.choice(SHAPES)), str(rng.choice(COLORS)), (8.0, 12.0))
        things = [*things, extra] if extra else things
    return things


def _flawed(rng: Generator, metadata: Metadata) -> str:
    """A caption that is wrong in one word or leaves something out."""
    include = [dict(clause) for clause in metadata["include"]]
    clause = include[-1]
    flaws: list[Callable[[], str]] = [lambda: f"a photo of {_named({'class': clause['class'], 'count': 1})}"]
    if "color" in clause:
        wrong = str(rng.choice([c for c in COLORS if c != clause["color"]]))
        flaws.append(lambda: prompt_of([*include[:-1], {**clause, "color": wrong}]))
    if "position" in clause:
        relation = str(rng.choice([r for r in RELATIONS if r != clause["position"][0]]))
        flaws.append(lambda: prompt_of([*include[:-1], {**clause, "position": [relation, 0]}]))
        flaws.append(lambda: prompt_of([{k: v for k, v in c.items() if k != "position"} for c in include]))
    if clause["count"] > 1:
        count = int(rng.choice([n for n in NUMBERS if n != clause["count"]]))
        flaws.append(lambda: prompt_of([{**clause, "count": count}]))
    if len(flaws) == 1:
        shape = str(rng.choice([s for s in SHAPES if s != clause["class"]]))
        flaws.append(lambda: prompt_of([*include[:-1], {**clause, "class": shape}]))
    return flaws[rng.integers(len(flaws))]()


def _background(rng: Generator, style: Style) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    if rng.random() < style.tint:
        top, bottom = ([int(c) for c in rng.integers(195, 250, 3)] for _ in range(2))
        return (top[0], top[1], top[2]), (bottom[0], bottom[1], bottom[2])
    grey = int(rng.integers(232, 250))
    return (grey, grey, grey), (grey, grey, grey)
