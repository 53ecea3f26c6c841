"""The ``cache`` block of a recipe.

Nothing heavy is imported: every command reads a recipe.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.registry import AnyPath, Spec, field_error

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def size_in_bytes(value: Any) -> Any:
    """The number of bytes that a text such as ``20GB`` or ``1.5 GiB`` means; other types are returned as they
    are. Raises ValueError for any other text."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip(), re.ASCII)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{value!r} is no size: write a number and a unit, such as 500MB, 20GB or 1.5TB")
    return round(float(match[1]) * units[match[2].lower()])


class Cache(Spec):
    """Encodings that are computed once and then read by all stages, and by other runs on this machine."""

    prompts: bool = False
    """Whether to keep encoded prompts, of training, image grids and evaluations."""
    latents: Literal["off", "mean_logvar", "sampled"] = "off"
    """Encoded training images to keep. ``mean_logvar`` keeps the encoder's posterior, from which each step
    draws, exactly as without a cache. ``sampled`` keeps one draw per image for all epochs, at half the
    size."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype on disk. ``fp32`` keeps values as they were computed; ``bf16`` rounds float32 values."""
    path: AnyPath | None = None
    """Folder of the cache. Default: ``posttrain`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    max_size: Annotated[int, BeforeValidator(size_in_bytes), Field(ge=1_000_000)] = 50 * 10**9
    """Largest size of the folder, in bytes or as a text such as ``50GB``; at least 1 MB. When it is full, the
    files that were used longest ago are removed."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if not self.prompts and self.latents == "off":
            for name in ("dtype", "path", "max_size"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    message = "would have no effect, since nothing is cached: set 'prompts' or 'latents' too"
                    raise field_error((name,), message)
        return self

    def folder(self) -> Path:
        """The cache's folder, as an absolute path."""
        if self.path is not None:
            return self.path.expanduser().absolute()
        return default_folder()


def default_folder() -> Path:
    """``posttrain`` in the user's cache folder, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification says to ignore relative values
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "posttrain"
