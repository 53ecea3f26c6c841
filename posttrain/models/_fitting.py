"""Checks by their configurations that a pipeline's components fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.errors import ModelError


def check_widths(transformer: Any, *parts: tuple[str, str, int, str]) -> None:
    """Raise ModelError if a component is not as wide as the ``transformer``, a configuration, takes it.

    Each of ``parts`` is a component, words for its width such as ``its width is``, the width, and the setting
    of the transformer that must be equal to it.
    """
    for part, words, width, name in parts:
        if width != transformer[name]:
            raise ModelError(
                f"{part} does not fit: {words} {width}, the transformer's {name} is {transformer[name]}"
            )


def check_settings(component: str, config: Any, known: Mapping[str, Any], words: str) -> None:
    """Raise ModelError if a setting of a component's ``config`` is not as ``known``; ``words``, such as
    ``FLUX.2 klein has``, come before the known value."""
    for name, value in known.items():
        found = config[name]
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ModelError(f"{component}/config.json: {name} is {found}; {words} {value}")


def check_scheduler(config: Any) -> None:
    """Raise ModelError if the scheduler's sigmas are no shift of a uniform grid: training draws from a shift,
    and would learn other noise levels than those at which images are sampled."""
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(name):
            raise ModelError(
                f"scheduler/scheduler_config.json: {name} is true; sigmas must be a uniform grid that is "
                "shifted, as without it"
            )
