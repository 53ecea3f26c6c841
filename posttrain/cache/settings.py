"""The ``cache`` block of a recipe.

Nothing heavy is imported: every command reads a recipe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.registry import FREE, NO_PATH, MaybePath, Spec, field_error
from posttrain.support.paths import default_folder, expanded

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
    if (size := float(match[1]) * units[match[2].lower()]) >= 2**63:
        raise ValueError(f"{value[:40]!r} is more than any disk has")
    return round(size)


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
    path: Annotated[MaybePath, FREE] = NO_PATH
    """Folder of the cache. Default: ``posttrain`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    max_size: Annotated[int, BeforeValidator(size_in_bytes), Field(ge=1_000_000), FREE] = 50 * 10**9
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

    def deciding(self, *, late: bool = True) -> dict[str, Any]:
        """What is cached otherwise than it is computed; see :meth:`posttrain.registry.Spec.deciding`."""
        del late  # no field is marked LATE
        cached = [*(["prompts"] if self.prompts else []), *(["latents"] if self.latents != "off" else [])]
        return {
            "latents": "sampled" if self.latents == "sampled" else "not sampled",
            "dtype": f"bf16 for {' and '.join(cached)}" if self.dtype == "bf16" else "fp32",
        }

    def folder(self) -> Path:
        """The cache's folder, as an absolute path."""
        if self.path is not None:
            return expanded(self.path).absolute()
        return default_folder()
