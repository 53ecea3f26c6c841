"""Lists the algorithms, models and types of data, with what each is, and the package it comes with."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from posttrain.algorithm import Algorithm
from posttrain.data.family import Data
from posttrain.model import Model
from posttrain.recipe.variants import AnyAlgorithm, AnyData, AnyModel
from posttrain.registry import Named
from posttrain.support.plugins import package_of
from posttrain.support.wording import described

assert AnyAlgorithm is not None, "importing it registers every algorithm"
assert AnyModel is not None, "and every model"
assert AnyData is not None, "and every type of data"

PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Entry:
    """One variant."""

    name: str
    """Its ``type`` in a recipe."""
    summary: str
    """The first sentence of its class's docstring."""
    needs: str
    """What it needs of a stage or gives to it, or what it can be used for."""
    papers: tuple[str, ...]
    """The papers that the docstrings of its module, its class and its base classes cite."""
    package: str
    """The package that it comes with; a plug-in's with its version."""


def algorithms() -> list[Entry]:
    """The installed algorithms, sorted by name."""
    return [
        _entry("posttrain.algorithms", name, kind, f"needs {getattr(kind, 'needs', '?')}")
        for name, kind in sorted(Algorithm.variants.items())
    ]


def models() -> list[Entry]:
    """The installed model families, sorted by name."""
    return [
        _entry("posttrain.models", name, kind, _use(kind)) for name, kind in sorted(Model.variants.items())
    ]


def data() -> list[Entry]:
    """The installed types of data, sorted by name."""
    return [
        _entry("posttrain.data", name, kind, f"gives {getattr(kind, 'gives', '?')}")
        for name, kind in sorted(Data.variants.items())
    ]


def _use(kind: type[Named]) -> str:
    """Whether a model family can be trained, and which pipelines of diffusers it loads."""
    use = "training and evaluation" if getattr(kind, "trainable", True) else "evaluation only"
    pipelines = ", ".join(getattr(kind, "pipelines", ()))
    return f"{use}{f'; loads {pipelines}' if pipelines else ''}"


def _entry(group: str, name: str, kind: type[Named], needs: str) -> Entry:
    summary = re.split(r"(?<=\.)\s+(?=[A-Z])", described(kind, Named))[0]
    cited: list[str] = []
    for base in kind.__mro__:
        if issubclass(base, Named) and base.__module__ not in ("posttrain.registry", "posttrain.algorithm"):
            module = sys.modules.get(base.__module__)
            cited += PAPER.findall(f"{module.__doc__ if module else ''} {base.__doc__}")
    return Entry(name, summary, needs, tuple(dict.fromkeys(cited)), package_of(group, name))
