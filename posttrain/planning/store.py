"""Keeps counts of models on disk, so that the next plan of the same model need not build it.

The counts of the shipped recipes' models come with the package (``counted.json``). Others are kept in
``counts/`` of posttrain's cache folder, one file for each model, under a hash of everything that a count
depends on: the model's settings and configurations, the libraries' versions, and the source that counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.cache.keys import digest
from posttrain.cache.settings import default_folder
from posttrain.errors import PosttrainError
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._outline import configs_at
from posttrain.models.tiny_sd3 import TinySD3
from posttrain.support.files import write
from posttrain.support.versions import versions

if TYPE_CHECKING:
    from posttrain.model import Model

SHIPPED = Path(__file__).with_name("counted.json")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
"""Packages of which another version may count otherwise."""
SOURCE = (
    *(
        f"planning/{name}.py"
        for name in ("counts", "folding", "footprint", "held", "kernels", "profile", "sizes")
    ),
    *(f"policy/{name}.py" for name in ("activations", "blocks", "tuning")),
    "flow_model.py",
    "model.py",
    "models/*.py",
)
"""The files of the package that decide what is counted."""
T = TypeVar("T")


class Store:
    """JSON values by key: those that come with the package, and those that were counted on this machine."""

    def __init__(self, shipped: Mapping[str, Any], file: Path | None = None) -> None:
        self.shipped, self.file = shipped, file
        self.kept = {} if file is None else _read(file)
        self.changed = False

    def get(self, key: tuple[Any, ...], load: Callable[[Any], T]) -> T | None:
        """The value of ``key``; None if there is none, or if ``load`` cannot read it."""
        name = json.dumps(key)
        for values in (self.shipped, self.kept):
            if name in values:
                with contextlib.suppress(ValueError, TypeError):
                    return load(values[name])
        return None

    def put(self, key: tuple[Any, ...], value: T, dump: Callable[[T], Any]) -> T:
        """Keep ``value``, of which ``dump`` makes JSON values, and return it."""
        self.kept[json.dumps(key)] = dump(value)
        self.changed = True
        return value

    def save(self) -> None:
        """Write what is new. A folder that cannot be written is no fault: the next plan counts again."""
        if self.changed and self.file is not None:
            with contextlib.suppress(PosttrainError, OSError):
                # another process may have written meanwhile
                write(self.file, json.dumps({**_read(self.file), **self.kept}))
                self.changed = False


@contextlib.contextmanager
def store_of(model: Model) -> Iterator[Store | None]:
    """The store of ``model``, written at the end of the block.

    None for a model of another package, whose counts may depend on what posttrain does not know.
    """
    about = description_of(model)
    if about is None:
        yield None
        return
    exact = digest(identity(about), versions(LIBRARIES), _source())
    store = Store(_shipped().get(identity(about), {}), default_folder() / "counts" / f"{exact}.json")
    try:
        yield store
    finally:
        store.save()


def description_of(model: Model) -> dict[str, Any] | None:
    """What decides the counts of ``model``: its settings and its components' configurations, not its weights.
    None if that is unknown."""
    if isinstance(model, TinySD3):
        return {"settings": model.model_dump(mode="json")}
    if not isinstance(model, DiffusersModel) or (configs := configs_at(model.path, model.revision)) is None:
        return None
    if not type(model).__module__.startswith("posttrain.models."):
        return None
    # where the weights are, and where encoders rest, changes no count
    settings = model.model_dump(mode="json", exclude={"path", "revision", "offload"})
    return {"settings": settings, "configs": {name: dict(config) for name, config in configs.items()}}


def identity(about: dict[str, Any]) -> str:
    """The name of a model's counts in the shipped file: a hash of what :func:`description_of` returned."""
    return digest(json.dumps(about, sort_keys=True))


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    return {name: entry["counts"] for name, entry in json.loads(SHIPPED.read_text("utf-8")).items()}


@cache
def _source() -> str:
    """A hash of the files of SOURCE."""
    root = Path(__file__).parents[1]
    return digest(*(file.read_text("utf-8") for name in SOURCE for file in sorted(root.glob(name))))


def _read(file: Path) -> dict[str, Any]:
    """The values in ``file``; none if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(file.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}
