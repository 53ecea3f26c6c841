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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union, get_args, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from posttrain.support import user_code
from posttrain.support.paths import expanded
from posttrain.support.plugins import load_plugins
from posttrain.support.shipped import shipped
from posttrain.support.user_errors import as_user_error, last_line

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

USER_CLASS = r"^[^:]+:[^:]+$"
"""How a block's ``type`` names a class of the user's own: ``module:Class``."""

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
        if _address(other) != _address(cls):  # a cell of a notebook that is run again replaces its class
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


class AnyOf:
    """Annotates a field that takes any variant of ``family``, also one that is defined after the field.

    A variant is given as an object, or as a block whose ``type`` is the variant's name or ``module:Class``.
    """

    def __init__(self, family: type[Named], package: str) -> None:
        self.family = family
        self._adapters: dict[tuple[type[Named], ...], TypeAdapter[Any]] = {}
        self._shipped = frozenset(discover(family, package).values())

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        del source, handler
        dump = core_schema.plain_serializer_function_ser_schema(self._dumped, info_arg=True)
        return core_schema.no_info_plain_validator_function(self._validated, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> Any:
        del schema
        # a block of a class that is loaded when the recipe is read: its fields are not known before
        named = {
            "type": {"type": "string", "pattern": USER_CLASS, "description": "A class, as module:Class."}
        }
        own = {"type": "object", "properties": named, "required": ["type"]}
        return {"anyOf": [handler(self._adapter().core_schema), own]}

    def _validated(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return self._adapter().validate_python(value)
        if ":" in (named := str(value.get("type"))):
            value = {**value, "type": self._loaded(named)}
        try:
            made = self._adapter().validate_python(value)
        except TypeError as error:  # the class lacks a method, or has an __init__ of its own
            if as_user_error(error) is not None:
                raise
            raise field_error(("type",), f"cannot make {named!r}: {last_line(error)}") from error
        if not isinstance(made, self.family):
            raise field_error(("type",), f"a validator of {named!r} returns {made!r}: let it return self")
        return made

    def _dumped(self, value: Any, info: SerializationInfo) -> Any:
        """The block of ``value``. Its ``type`` finds the class again in a process that has not loaded it."""
        if not isinstance(value, Named):
            return value  # not validated: model_construct and model_copy take anything
        block = value.model_dump(mode=info.mode)
        return block if type(value) in self._shipped else {**block, "type": _address(type(value))}

    def _adapter(self) -> TypeAdapter[Any]:
        """The union, discriminated by ``type``, of the variants that there are now."""
        # a class whose annotations name nothing would spoil the blocks of all others
        every = self.family.variants.values()
        variants = tuple(v for v in every if v.__pydantic_complete__ or v.model_rebuild(raise_errors=False))
        if variants not in self._adapters:
            # pydantic refuses a discriminator for a single class
            union: Any = variants[0]
            if len(variants) > 1:
                union = Annotated[Union[variants], Field(discriminator="type")]  # noqa: UP007
            self._adapters[variants] = TypeAdapter(union)
        return self._adapters[variants]

    def _loaded(self, named: str) -> str:
        """The type's name of the class that ``named`` names. Raises the error of the field ``type``."""
        kind = self.family.__name__.lower()
        for name, variant in self.family.variants.items():
            if _address(variant) == named:
                return name
        if named.startswith("__main__:"):
            fault = "was defined in a notebook or script: define it there first, or move it to a module"
            raise field_error(("type",), f"{named!r} {fault}")
        try:
            found = user_code.load(named)
            if found in self.family.variants.values():
                found.model_rebuild()  # raises where an annotation names nothing
        except Exception as error:  # whatever the user's own module raises when it is run
            fault = str(error).partition("\n")[0]
            raise field_error(("type",), f"cannot load the {kind} {named!r}: {fault}") from error
        if found not in self.family.variants.values():
            expected = f"a subclass of {self.family.__name__} with a line such as type: Literal['x'] = 'x'"
            raise field_error(
                ("type",), f"{named!r} is no {kind} with a 'type' of its own: it must be {expected}"
            )
        return found.model_fields["type"].default


def _address(variant: type) -> str:
    return f"{variant.__module__}:{variant.__qualname__}"
