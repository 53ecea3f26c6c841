"""Specs (strict, frozen pydantic models of a recipe's blocks) and the registry of their types.

A spec is the schema of a YAML block and also the object that the block describes: an algorithm, a model, a
reward. Defining a subclass with a literal ``type`` registers it; no list has to be edited.
"""

from __future__ import annotations

import enum
import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, overload

from pydantic import AfterValidator, BaseModel, ConfigDict, Strict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from posttrain.support.paths import expanded
from posttrain.support.plugins import load_plugins
from posttrain.support.shipped import shipped

Variants = dict[str, "type[Named]"]

FieldPath = tuple[str | int, ...]
"""The keys and list indices that lead to a field, such as ``("stages", 0, "train", "steps")``."""

if TYPE_CHECKING:

    class AnyPath:
        """Tells type checkers that the field takes a string too, and holds a Path."""

        @overload
        def __get__(self, instance: None, owner: Any) -> AnyPath: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> Path: ...
        def __get__(self, instance: Any, owner: Any) -> Any: ...
        def __set__(self, instance: Any, value: str | os.PathLike[str]) -> None: ...

    class MaybePath:
        """As AnyPath, or None."""

        @overload
        def __get__(self, instance: None, owner: Any) -> MaybePath: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> Path | None: ...
        def __get__(self, instance: Any, owner: Any) -> Any: ...
        def __set__(self, instance: Any, value: str | os.PathLike[str] | None) -> None: ...
else:
    AnyPath = Annotated[Path, Strict(False), AfterValidator(expanded)]
    """The type of a field that is a path, in which ``~`` is the home folder. YAML gives a string, which a
    strict spec would refuse."""
    MaybePath = AnyPath | None
    """The type of a field that is a path or None."""

NO_PATH: Any = None
"""The default of a field of type MaybePath, which type checkers accept."""

FIELD_ERROR = "posttrain_field"
"""The pydantic error type of :func:`field_error`."""


def field_error(path: FieldPath, message: str) -> PydanticCustomError:
    """The error that a block's validator raises when one field is wrong.

    ``path`` leads from the block to that field; the recipe's error message then names the field and its line.
    """
    return PydanticCustomError(FIELD_ERROR, "{message}", {"path": path, "message": message})


class Mark(enum.Enum):
    """What a field decides, as ``Annotated`` says beside its type. Without a mark it decides the result."""

    FREE = enum.auto()
    """No result, but for rounding: cadence, logging, memory, speed. A run may go on with another value."""
    LATE = enum.auto()
    """When or how trained weights are written, not how they train: a stage may go on with another value."""


FREE, LATE = Mark.FREE, Mark.LATE


def mark_of(field: FieldInfo) -> Mark | None:
    """The mark of a spec's field, or None."""
    return next((mark for mark in field.metadata if isinstance(mark, Mark)), None)


InWords = Callable[[ValidationError, type[BaseModel], Mapping[str, Any]], Exception]
"""The error that a person gets for pydantic's error about a class and the fields that it was given."""
_IN_WORDS: list[InWords] = []

if TYPE_CHECKING:
    _Told = BaseModel
else:

    class _Telling(type(BaseModel)):
        """Words the errors of specs that are made in Python. Those of blocks inside have their path too."""

        def __call__(cls, *arguments: Any, **fields: Any) -> Any:
            try:
                return super().__call__(*arguments, **fields)
            except ValidationError as error:
                if not _IN_WORDS:
                    raise
                raise _IN_WORDS[-1](error, cls, fields) from None

    class _Told(BaseModel, metaclass=_Telling):
        pass


def tell_errors_with(words: InWords) -> None:
    """Let ``words`` make the errors of specs that are made in Python. The room of recipes has the words."""
    _IN_WORDS.append(words)


class Spec(_Told):
    """A block of a recipe. Unknown fields, type conversions, infinities and NaN are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    def deciding(self, *, late: bool = True) -> dict[str, Any]:
        """The fields that decide results, and those of the blocks inside, as they are in YAML.

        All fields count, except those that are marked FREE, and without ``late`` those marked LATE.
        """
        out = {FREE} if late else {FREE, LATE}
        plain = self.model_dump(mode="json")
        return {
            name: _deciding(getattr(self, name), plain[name], late)
            for name, field in type(self).model_fields.items()
            if mark_of(field) not in out
        }


def _deciding(value: Any, plain: Any, late: bool) -> Any:
    """What :meth:`Spec.deciding` returns of one field's ``value``, which is ``plain`` in YAML."""
    if isinstance(value, Spec):
        return value.deciding(late=late)
    if isinstance(value, list):
        return [_deciding(item, text, late) for item, text in zip(value, plain, strict=True)]
    return plain


class Named(Spec):
    """A spec with variants. A variant has ``type: Literal["name"] = "name"`` and cannot be subclassed."""

    type: str
    variants: ClassVar[Variants]
    """Type name -> class. Each direct subclass of Named has its own family of variants."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if Named in cls.__bases__:
            cls.variants = {}
        kind = cls.model_fields["type"]
        if not (names := get_args(kind.annotation)):
            return  # an abstract base
        if names != (kind.default,):
            example = f"type: Literal[{names[0]!r}] = {names[0]!r}"
            raise TypeError(
                f"the type of {cls.__name__} must be one literal that is also its default: {example}"
            )
        for base in cls.__mro__[1:]:
            if base in cls.variants.values():
                raise TypeError(
                    f"{cls.__name__} extends {base.__name__}, which is final: share an abstract base instead"
                )
        other = cls.variants.get(names[0], cls)
        if address(other) != address(cls):  # a cell of a notebook that is run again replaces its class
            raise TypeError(f"type {names[0]!r} is taken by {other.__module__}.{other.__name__}")
        cls.variants[names[0]] = cls


FAMILIES: dict[str, type[Named]] = {}
"""The package, which is also the group of entry points, of each family that was discovered."""


def discover(family: type[Named], package: str) -> Variants:
    """Import every public module of ``package`` and every entry point in the group of that name.

    Returns the family's variants by name. An entry point that fails is left out with a warning. Raises
    InstallError if the install lacks ``package`` and ImportError if a module of its own cannot be imported.
    """
    for module in pkgutil.iter_modules(shipped(package).__path__):
        if not module.name.startswith("_"):  # private modules hold no variant and may import heavy libraries
            importlib.import_module(f"{package}.{module.name}")
    load_plugins(package, family.variants)
    FAMILIES[package] = family
    return family.variants


def address(variant: type) -> str:
    """``module:Class``, by which a block's ``type`` names a class of the user's own."""
    return f"{variant.__module__}:{variant.__qualname__}"
