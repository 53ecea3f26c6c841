"""A recipe's field that takes any variant of a family: an algorithm, a model, a reward or data."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import Field, SerializationInfo, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from posttrain.registry import Named, address, discover, field_error
from posttrain.support import user_code
from posttrain.support.user_errors import as_user_error, last_line

USER_CLASS = r"^[^:]+:[^:]+$"
"""How a block's ``type`` names a class of the user's own: ``module:Class``."""


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
        return block if type(value) in self._shipped else {**block, "type": address(type(value))}

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
            if address(variant) == named:
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
