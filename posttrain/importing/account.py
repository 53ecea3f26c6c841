"""The account of a translation: what became of each flag, and whether posttrain accepts the recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from posttrain.errors import RecipeError
from posttrain.importing.draft import Draft, value_of
from posttrain.recipe.checks import machine_problems
from posttrain.recipe.file import parse_recipe

Told = list[tuple[str, str]]
"""Flags with their values, and what became of each."""


@dataclass(frozen=True)
class Translation:
    """A recipe, and what became of each flag."""

    text: str
    translated: Told
    idle: Told
    lost: Told
    differs: list[str]
    unknown: list[str]
    yours: list[str]
    """What ``posttrain check`` still misses on this machine, such as files of data."""


def checked(draft: Draft, text: str) -> Translation:
    """The translation, whose recipe the reader has accepted. Raises RecipeError if it does not."""
    settings = draft.settings
    try:
        recipe = parse_recipe(text, "recipe", checks=False)
    except RecipeError as error:
        message = _with_flags(str(error), text)
        raise RecipeError(
            f"{settings.trainer}'s values give a recipe that posttrain refuses:\n{message}"
        ) from None
    yours = [f"{'.'.join(map(str, path))}: {words}" for path, words in machine_problems(recipe)]
    return Translation(
        text, *_became(draft), [*_by_default(draft), *draft.differs], list(settings.hints()), yours
    )


def _by_default(draft: Draft) -> list[str]:
    """What is lost of flags that were not given, whose default does something."""
    settings = draft.settings
    return [
        f"{settings.spelled(name)} is{value_of(settings[name])} there by default: {words}"
        for name, words in draft.lost.items()
        if name not in settings
    ]


def _with_flags(message: str, text: str) -> str:
    """``message``, with the flag beside each line of the recipe that it names."""
    lines = text.splitlines()

    def comment(match: re.Match[str]) -> str:
        _, _, flags = lines[int(match[1]) - 1].partition("  # ")
        return f"recipe:{match[1]} ({flags}): " if flags else match[0]

    return re.sub(r"^recipe:(\d+): ", comment, message, flags=re.M)


def _became(draft: Draft) -> tuple[Told, Told, Told]:
    """The flags that were translated, those that are not needed, and those whose effect is lost."""
    settings = draft.settings
    translated: Told = []
    idle: Told = []
    lost: Told = []
    for name, value in settings.given.items():
        flag, shown = settings.table[name], f"{settings.spelled(name)}{value_of(value)}"
        if name in draft.fields:
            translated.append((shown, ", ".join(draft.fields[name])))
        if name in draft.lost:
            lost.append((shown, draft.lost[name]))
        elif name in draft.fields:
            continue
        elif name in draft.idle or flag.idle:
            idle.append((shown, draft.idle.get(name) or flag.idle))
        elif value in flag.off:
            idle.append((shown, "off, as here"))
        else:
            lost.append((shown, flag.nearest or "no field of the recipe comes from it"))
    for name, value in settings.defaults.items():  # of a user's own base
        flag = settings.table[name]
        if flag.nearest and value not in flag.off and name not in settings and name not in draft.lost:
            lost.append((f"{settings.spelled(name)}{value_of(value)}", flag.nearest))
    return translated, idle + draft.more_idle, lost + draft.more_lost
