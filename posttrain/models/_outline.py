"""Builds a diffusers pipeline from configurations alone, with random or no weights.

On torch's meta device it takes no memory, so a plan can count it. Its tokenizers are stand-ins that number a
word by a hash of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from posttrain.models._published import PUBLISHED
from posttrain.weights import pipeline_folder

if TYPE_CHECKING:
    import torch

Configs = Mapping[str, Mapping[str, Any]]
"""Component -> its configuration; see :data:`posttrain.models._published.PUBLISHED`."""
LAST = {"scheduler": "scheduler_config.json"}
"""Components whose configuration is not called ``config.json``."""


def configs_at(path: str) -> Configs | None:
    """The configurations of the pipeline at ``path``, from this machine or as published; None if unknown."""
    folder = pipeline_folder.local_folder(path)
    if folder is None or not (folder / "model_index.json").is_file():
        return PUBLISHED.get(path)
    names = pipeline_folder.components(folder)
    found = {n: c for n in names if (c := pipeline_folder.config(path, n, LAST.get(n, "config.json")))}
    return found if {"transformer", "vae"} <= found.keys() else PUBLISHED.get(path)


def outlined(
    pipeline: str,
    configs: Configs,
    absent: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> Any | None:
    """The diffusers pipeline of class ``pipeline``, its components on ``device``, in ``dtypes`` by name or
    ``default``; None where a component has no configuration and is not one that may be ``absent``."""
    import diffusers
    import torch

    kind: Any = getattr(diffusers, pipeline)
    types = kind._get_signature_types()
    names, _ = kind._get_signature_keys(kind)
    made: dict[str, Any] = dict.fromkeys(names)
    models = {name for name in made if not name.startswith(("tokenizer", "scheduler"))}
    if models - configs.keys() - {*absent, *kind._optional_components}:
        return None
    with torch.device(device):
        for name in made.keys() & configs.keys():
            made[name] = _component(dict(configs[name]), types[name])
            if isinstance(made[name], torch.nn.Module):
                made[name].to(dtypes.get(name, dtypes["default"]))
    for name in made:
        if name.startswith("tokenizer") and (encoder := made.get(name.replace("tokenizer", "text_encoder"))):
            made[name] = Numbering(encoder.config)
    made["scheduler"] = made["scheduler"] or types["scheduler"][0]()
    return kind(**made)


def _component(config: dict[str, Any], types: Sequence[Any]) -> Any:
    """A component of the class that its configuration names, or of the first that the pipeline takes."""
    import diffusers
    import transformers

    named = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    for library in (diffusers, transformers):
        if named is not None and hasattr(library, named):
            kind = getattr(library, named)
            break
    else:
        kind = types[0]
    if hasattr(kind, "config_class"):  # transformers' classes take a configuration object
        return kind(kind.config_class(**config))
    return kind.from_config(config)


class Numbering:
    """Stands in for the tokenizer of a text encoder with that configuration."""

    def __init__(self, config: Any) -> None:
        self.model_max_length = int(getattr(config, "max_position_embeddings", 512))
        end = getattr(config, "eos_token_id", None)
        self.end = end if isinstance(end, int) else 1

    def __call__(self, texts: Sequence[str], max_length: int | None = None, **_: Any) -> SimpleNamespace:
        """``input_ids`` and ``attention_mask`` (n, length): the words' numbers, then the end's."""
        import torch

        length, words = max_length or self.model_max_length, self.end - 2 if self.end > 2 else 30
        rows = [[2 + zlib.crc32(word.encode()) % words for word in text.split()] for text in texts]
        rows = [[*row[: length - 1], *[self.end] * (length - len(row[: length - 1]))] for row in rows]
        ids = torch.tensor(rows, device="cpu")
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        """A word for each number, for messages."""
        return [" ".join(map(str, row)) for row in ids.tolist()]
