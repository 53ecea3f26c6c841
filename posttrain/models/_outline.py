"""Builds a diffusers pipeline from configurations alone, with random or no weights.

On torch's meta device it takes no memory, so a plan can count it. Its tokenizers are stand-ins: the number of
a word is a hash of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.models._published import PUBLISHED
from posttrain.weights import pipeline_folder
from posttrain.weights.text_processor import text_processor
from posttrain.weights.tokenizer import encoder_of

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding

Configs = Mapping[str, Mapping[str, Any]]
"""The configuration of each component, as in :data:`posttrain.models._published.PUBLISHED`."""
CONFIG_FILES = {"scheduler": "scheduler_config.json"}
"""The configuration files that are not called ``config.json``."""
PIPELINE = "pipeline"
"""Where :data:`Configs` have the pipeline's own settings, those in its index that name no component."""


def configs_at(path: str, revision: str | None = None) -> Configs | None:
    """The configurations of the pipeline at ``path``: those on this machine, else the published ones, else
    None."""
    folder = pipeline_folder.local_folder(path, revision)
    if folder is None or not (folder / "model_index.json").is_file():
        return PUBLISHED.get(path)
    names = pipeline_folder.components(folder)
    files = {name: CONFIG_FILES.get(name, "config.json") for name in names}
    configs = {n: c for n, file in files.items() if (c := pipeline_folder.config(path, n, file, revision))}
    if not {"transformer", "vae"} <= configs.keys():
        return PUBLISHED.get(path)
    index = pipeline_folder.index_in(folder)
    own = {n: v for n, v in index.items() if n[0] != "_" and not _names_component(v)}
    return {**configs, PIPELINE: own} if own else configs


def _names_component(value: Any) -> bool:
    """Whether an entry of a pipeline's index is a library and a class, or null for both."""
    return isinstance(value, list) and all(part is None or isinstance(part, str) for part in value)


def outlined(
    pipeline: str,
    configs: Configs,
    absent: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> Any | None:
    """The diffusers pipeline of class ``pipeline`` with its components on ``device``.

    ``dtypes`` gives the precision of a component, with ``default`` for the others. Returns None if a
    component has no configuration and may not be ``absent``, or this diffusers has no such class.
    """
    import diffusers
    import torch

    if pipeline not in dir(diffusers):
        return None
    kind: Any = getattr(diffusers, pipeline)
    types = kind._get_signature_types()
    names, optional = kind._get_signature_keys(kind)
    made: dict[str, Any] = dict.fromkeys(names)
    models = {name for name in made if name != "scheduler" and encoder_of(name) is None}
    if models - configs.keys() - {*absent, *kind._optional_components}:
        return None
    for name in made.keys() & configs.keys():
        with torch.device("cpu" if name == "scheduler" else device):  # schedulers compute when they are made
            try:
                made[name] = _component(dict(configs[name]), types[name])
            except Exception as error:  # whatever a class raises that is given a foreign value
                what = (str(error).strip() or type(error).__name__).splitlines()[0]
                file = f"{name}/{CONFIG_FILES.get(name, 'config.json')}"
                raise ModelError(f"{file} cannot be used: {what}") from error
        if isinstance(made[name], torch.nn.Module):
            made[name].to(dtypes.get(name, dtypes["default"]))
    for name in made:
        if (encoder := made.get(encoder_of(name) or "")) is not None:
            numbering = Numbering(encoder.config)
            made[name] = text_processor(numbering) if name.startswith("processor") else numbering
    made["scheduler"] = made["scheduler"] or types["scheduler"][0]()
    own = {name: value for name, value in configs.get(PIPELINE, {}).items() if name in optional}
    return kind(**made, **own)


def _component(config: dict[str, Any], types: Sequence[Any]) -> Any:
    """A component of the class that its configuration names; by default, of the first class in ``types``."""
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
    """Stands in for the tokenizer of a text encoder with the configuration ``config``."""

    def __init__(self, config: Any) -> None:
        self.model_max_length = int(getattr(config, "max_position_embeddings", 512))
        end = getattr(config, "eos_token_id", None)
        self.end = end if isinstance(end, int) else 1
        self.added_tokens_encoder: dict[str, int] = {}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tokenize: bool = False, **_: Any
    ) -> str | list[int]:
        """The contents of ``messages``, texts or lists of parts with texts; or their numbers."""
        contents = [message["content"] for message in messages]
        texts = [c if isinstance(c, str) else " ".join(part["text"] for part in c) for c in contents]
        return self.encode(" ".join(texts)) if tokenize else " ".join(texts)

    def __call__(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        padding: str | bool = "max_length",
        **_: Any,
    ) -> BatchEncoding:
        """``input_ids`` and ``attention_mask``, (n, length) each: the words' numbers, padded with the end
        token to ``max_length`` or, with ``padding`` ``longest``, as the longest text needs."""
        import torch
        from transformers import BatchEncoding

        vocabulary = self.end - 2 if self.end > 2 else 30
        rows = [[2 + zlib.crc32(word.encode()) % vocabulary for word in text.split()] for text in texts]
        longest = 1 + max(map(len, rows), default=0)
        length = longest if padding == "longest" else max_length or self.model_max_length
        rows = [[*row[: length - 1], *[self.end] * (length - len(row[: length - 1]))] for row in rows]
        ids = torch.tensor(rows, device="cpu")
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def encode(self, text: str) -> list[int]:
        """The numbers of the words of ``text``, with the end token."""
        return [*range(len(text.split())), self.end]

    def tokenize(self, text: str) -> list[str]:
        """The words, in which some pipelines look for embeddings that were trained."""
        return text.split()

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        """The numbers as text, for messages."""
        return [" ".join(map(str, row)) for row in ids.tolist()]
