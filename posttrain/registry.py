"""Specs: frozen pydantic models that a recipe names by ``type``.

A spec is both the schema of a block of YAML and the thing that block describes. Defining a subclass with
a literal ``type`` registers it; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from posttrain.support.shipped import shipped

Variants = dict[str, "type[Named]"]

AnyPath = Annotated[Path, Strict(False)]
"""A path that YAML may give as a string although specs are strict."""


AT = "at"
"""The kind of a validation error that :func:`at` makes."""


def at(place: tuple[str | int, ...], words: str) -> PydanticCustomError:
    """The error for a validator of a whole block to raise where one field of the block is to blame."""
    return PydanticCustomError(AT, "{words}", {"place": place, "words": words})


class Spec(BaseModel):
    """A strict, frozen block of a recipe: no unknown field, no silent conversion, no infinity or NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Named(Spec):
    """A spec with variants. A class with ``type: Literal["name"] = "name"`` is one, and it is final."""

    type: str
    variants: ClassVar[Variants]
    """Name -> class; each direct subclass of Named starts a family of its own."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if Named in cls.__bases__:
            cls.variants = {}
        if not (names := get_args(cls.model_fields["type"].annotation)):
            return  # abstract
        for base in cls.__mro__[1:]:
            if base in cls.variants.values():
                raise TypeError(
                    f"{cls.__name__} extends {base.__name__}, which is final: share an abstract base instead"
                )
        if (other := cls.variants.setdefault(names[0], cls)) is not cls:
            raise TypeError(f"type {names[0]!r} is taken by {other.__module__}.{other.__name__}")


def discover(family: type[Named], package: str) -> Variants:
    """Import every public module of ``package`` and every entry point of the group of that name.

    Returns the family's variants by name. Raises InstallError where the install lacks ``package``, and
    ImportError where a module cannot be imported.
    """
    for module in pkgutil.iter_modules(shipped(package).__path__):
        if not module.name.startswith("_"):  # what variants share is none, and may import heavy libraries
            importlib.import_module(f"{package}.{module.name}")
    for plugin in entry_points(group=package):
        plugin.load()
    return family.variants


def union(family: type[Named], package: str) -> Any:
    """The discriminated union of every variant of ``family`` found by :func:`discover`."""
    variants = tuple(discover(family, package).values())
    if len(variants) == 1:
        return variants[0]  # a union of one is none, and takes no discriminator
    return Annotated[Union[variants], Field(discriminator="type")]  # noqa: UP007
