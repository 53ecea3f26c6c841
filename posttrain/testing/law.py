"""What a law is, how a broken one is reported, and the laws of every block of a recipe."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from posttrain.registry import Named

L = TypeVar("L", bound="Laws")


class LawBroken(AssertionError):
    """A class breaks a law. The message names the class, the law, what was found, and what to do."""


class Found(Exception):
    """What a law's test found to be wrong."""


@dataclass(frozen=True)
class Law:
    """A law in words."""

    test: str
    """The name of its method."""
    words: str
    to_do: str
    """What to do if it is broken."""


def law(words: str, to_do: str) -> Callable[[Callable[[L], None]], Callable[[L], None]]:
    """Make a method a law: what it raises becomes a LawBroken that says the law and what is ``to_do``."""

    def decorated(check: Callable[[L], None]) -> Callable[[L], None]:
        @functools.wraps(check)
        def checked(self: L) -> None:
            subject = self.subject()
            try:
                check(self)
            except Exception as error:  # whatever the class under test raises
                first = str(error).partition("\n")[0]
                found = first if isinstance(error, Found) else f"{type(error).__name__}: {first}"
                kind = type(subject)
                raise LawBroken(
                    f"{kind.__module__}:{kind.__qualname__} (type {subject.type!r}) breaks a law: {words}.\n"
                    f"found: {found}\nto do: {to_do}"
                ) from error

        setattr(checked, "law", Law(check.__name__, words, to_do))  # noqa: B010
        return checked

    return decorated


def require(holds: Any, found: str) -> None:
    """Raise Found, which says what was ``found``, unless ``holds``."""
    __tracebackhide__ = True  # pytest then shows the line of the law
    if not holds:
        raise Found(found)


def laws(kind: type[Laws]) -> Iterator[Law]:
    """The laws of a class of laws, in the order of their definition."""
    for base in reversed(kind.__mro__):
        for name, member in vars(base).items():
            if (found := getattr(member, "law", None)) is not None and getattr(kind, name) is member:
                yield found


class Laws:
    """A class of tests. A subclass names what it tests in the attribute that :attr:`about` names."""

    about: ClassVar[str]
    """The attribute that holds the object under test, such as ``algorithm``."""
    family: ClassVar[type[Named]]
    """What the object must be."""

    def subject(self) -> Named:
        """The object under test. Raises LawBroken if it is missing or no object of the family."""
        found, name = getattr(self, self.about, None), type(self).__name__
        family = f"{self.family.__module__}.{self.family.__name__}"
        line = f"write '{self.about} = Mine()' in the class {name}, with an object of your class"
        if found is None:
            raise LawBroken(f"{name} does not say what it tests: {line}")
        if isinstance(found, type):
            raise LawBroken(f"{name}.{self.about} is the class {found.__name__}, not an object: {line}")
        if not isinstance(found, self.family):
            raise LawBroken(f"{name}.{self.about} is {type(found).__name__}, which is no {family}: {line}")
        return found


class BlockLaws(Laws):
    """The laws of a recipe's block of any family."""

    about = "block"
    family = Named

    @law(
        "its type finds it",
        'write \'type: Literal["mine"] = "mine"\' in a class that no other class of a type extends',
    )
    def test_its_type_finds_it(self) -> None:
        block = self.subject()
        require(
            type(block).variants.get(block.type) is type(block),
            f"type {block.type!r} is registered for {type(block).variants.get(block.type)}",
        )

    @law(
        "it says what it is and what its fields mean",
        "write a docstring for the class, and one below each field",
    )
    def test_it_says_what_it_is_and_what_its_fields_mean(self) -> None:
        kind = type(self.subject())
        require((vars(kind).get("__doc__") or "").strip(), "the class has no docstring")
        fields = {name: field for name, field in kind.model_fields.items() if name != "type"}
        bare = [name for name, field in fields.items() if not field.description]
        require(not bare, f"no docstring below {', '.join(bare)}")

    @law(
        "it is the same after it was written to a recipe, and in another process",
        "keep all settings in fields of plain types, and no other state",
    )
    def test_it_survives_its_recipe_and_pickle(self) -> None:
        block = self.subject()
        plain = block.model_dump(mode="json")
        require(
            type(block).model_validate_json(block.model_dump_json()) == block, f"{plain} is read as another"
        )
        require(pickle.loads(pickle.dumps(block)) == block, "pickle gives another one")
