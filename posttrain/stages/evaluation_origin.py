"""Settles what ``posttrain eval`` measures: its options first, then the model's run, then the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RecipeError
from posttrain.flow.sampling_settings import Sampling
from posttrain.recipe.file import evaluation_settings
from posttrain.recipe.schema import Evaluation
from posttrain.stages.origin import SAMPLING, Source, settled, sources_of
from posttrain.weights.run_folders import meaning_of

TOLD = ("prompts", "rewards", *SAMPLING, "images_per_prompt")
"""The settings whose origin the user is told."""


@dataclass(frozen=True)
class Asked:
    """The options of ``posttrain eval`` that say what is measured."""

    suite: str | None = None
    like: str | None = None
    prompts: str | None = None
    rewards: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def given(self, settings: Evaluation) -> dict[str, Any]:
        """Those of the ``settings`` that an option gave by itself."""
        names = {text.partition("=")[0].partition(".")[0].strip() for text in self.overrides}
        names |= {"prompts"} if self.prompts is not None else set()
        names |= {"rewards"} if self.rewards else set()
        return {name: getattr(settings, name) for name in names & {*TOLD}}


def settled_evaluation(model: str, asked: Asked, base: str | None = None) -> tuple[Evaluation, list[str]]:
    """The evaluation of ``model``, and a line for each place that its settings are from.

    ``--like`` and ``--suite`` give all of them. Without these, the run's recipe gives what no option does,
    and the model the size of its images. Raises RecipeError, DataError and ModelError.
    """
    named, sources = _named(asked), []
    if named is None:
        sources = sources_of(model, base)
    start = _start(sources)
    try:
        options = (asked.suite, asked.like, asked.prompts, asked.rewards, asked.overrides)
        settings = evaluation_settings(*options, start)
    except RecipeError as error:
        if sources and "evaluation" in str(error):
            raise RecipeError(f"{error}{_origins(sources)}") from error
        raise
    given = Source("the command line", asked.given(settings))
    whole = Source(named or sources[-1].place, {name: getattr(settings, name) for name in TOLD})
    lines = settled([given, *sources[:-1], whole], TOLD)[1]
    return settings, [*([line] if (line := meaning_of(model)) else []), *lines]


def _named(asked: Asked) -> str | None:
    """The published evaluation, or the recipe, whose settings are taken."""
    if asked.suite is not None:
        return f"the suite {asked.suite}" + ("" if asked.like is None else f" and the recipe {asked.like}")
    return None if asked.like is None else f"the recipe {asked.like}"


def _start(sources: list[Source]) -> Mapping[str, Any]:
    """The settings of ``sources`` as a recipe gives them, the first source counting most."""
    fields = dict.fromkeys(name for source in sources for name in source.settings)
    chosen, _ = settled(sources, [name for name in fields if name in Evaluation.model_fields])
    plain = Sampling.model_validate({}).model_dump()
    return {name: _plain(value) for name, value in chosen.items() if plain.get(name) != value}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _origins(sources: list[Source]) -> str:
    """Where settings that no option gave are from, for an error about them."""
    places = [source.place for source in sources if "prompts" in source.settings]
    return "".join(f" (what was not given is from {place})" for place in places[:1])
