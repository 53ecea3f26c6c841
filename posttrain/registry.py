"""Specs (strict, frozen pydantic models of a recipe's blocks) and the registry of their types.

A spec is the schema of a YAML block and also the object that the block describes: an algorithm, a model, a
reward. Defining a subclass with a literal ``type`` registers it; no list has to be edited.
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

FieldPath = tuple[str | int, ...]
"""The keys and list indices that lead to a field, such as ``("stages", 0, "train", "steps")``."""

AnyPath = Annotated[Path, Strict(False)]
"""A path. YAML gives it as a string, which a strict spec would refuse."""

FIELD_ERROR = "posttrain_field"
"""The pydantic error type of :func:`field_error`."""


def field_error(path: FieldPath, message: str) -> PydanticCustomError:
    """The error that a block's validator raises when one field is wrong.

    ``path`` leads from the block to that field; the recipe's error message then names the field and its line.
    """
    return PydanticCustomError(FIELD_ERROR, "{message}", {"path": path, "message": message})


class Spec(BaseModel):
    """A block of a recipe. Unknown fields, type conversions, infinities and NaN are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Named(Spec):
    """A spec with variants. A variant has ``type: Literal["name"] = "name"`` and cannot be subclassed."""

    type: str
    variants: ClassVar[Variants]
    """Type name -> class. Each direct subclass of Named has its own family of variants."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if Named in cls.__bases__:
            cls.variants = {}
        if not (names := get_args(cls.model_fields["type"].annotation)):
            return  # an abstract base
        for base in cls.__mro__[1:]:
            if base in cls.variants.values():
                raise TypeError(
                    f"{cls.__name__} extends {base.__name__}, which is final: share an abstract base instead"
                )
        if (other := cls.variants.setdefault(names[0], cls)) is not cls:
            raise TypeError(f"type {names[0]!r} is taken by {other.__module__}.{other.__name__}")


def discover(family: type[Named], package: str) -> Variants:
    """Import every public module of ``package`` and every entry point in the group of that name.

    Returns the family's variants by name. Raises InstallError if the install lacks ``package`` and
    ImportError if a module cannot be imported.
    """
    for module in pkgutil.iter_modules(shipped(package).__path__):
        if not module.name.startswith("_"):  # private modules hold no variant and may import heavy libraries
            importlib.import_module(f"{package}.{module.name}")
    for plugin in entry_points(group=package):
        plugin.load()
    return family.variants


def union(family: type[Named], package: str) -> Any:
    """The pydantic union, discriminated by ``type``, of the variants that :func:`discover` returns."""
    variants = tuple(discover(family, package).values())
    if len(variants) == 1:
        return variants[0]  # pydantic refuses a discriminator for a single class
    return Annotated[Union[variants], Field(discriminator="type")]  # noqa: UP007
