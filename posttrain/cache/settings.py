"""Which encodings are kept, where, and in how much room? The ``cache`` block of a recipe.

Imports nothing heavy: every command reads a recipe.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.registry import AnyPath, Spec, at

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def size_in_bytes(value: Any) -> Any:
    """The bytes that ``20GB``, ``1.5 GiB`` or a whole number mean. Raises ValueError for another text."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip(), re.ASCII)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"{value!r} is no size: write a number and a unit, such as 500MB, 20GB or 1.5TB")
    return round(float(found[1]) * units[found[2].lower()])


class Cache(Spec):
    """What is encoded once and then read, by all stages and by other runs on this machine."""

    prompts: bool = False
    """Keep encoded prompts: of training, of image grids and of evaluations."""
    latents: Literal["off", "mean_logvar", "sampled"] = "off"
    """Keep encoded training images. ``mean_logvar`` keeps the encoder's posterior, and each step draws
    from it as without a cache; ``sampled`` keeps one draw, half the size, which every epoch sees again."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of what is kept. ``fp32`` keeps every value as it was computed, ``bf16`` rounds float32 values."""
    path: AnyPath | None = None
    """A folder; by default ``posttrain`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    max_size: Annotated[int, BeforeValidator(size_in_bytes), Field(ge=1_000_000)] = 50 * 10**9
    """Bytes, or a text such as ``50GB``, that the folder may take; what was used longest ago goes first."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if not self.prompts and self.latents == "off":
            for name in ("dtype", "path", "max_size"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    words = (
                        "would have no effect, since nothing is cached: set 'prompts' or 'latents' as well"
                    )
                    raise at((name,), words)
        return self

    def folder(self) -> Path:
        """Where everything is kept, as an absolute path."""
        if self.path is not None:
            return self.path.expanduser().absolute()
        return default_folder()


def default_folder() -> Path:
    """``posttrain`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the standard asks for relative values to be ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "posttrain"
