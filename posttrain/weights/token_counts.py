"""Counts the tokens of captions by the tokenizers of a pipeline's folder, without loading a network."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.weights.hugging_face import quiet
from posttrain.weights.tokenizer import encoder_of

CHUNK = 1000
"""Captions that a tokenizer gets at once."""


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens a text encoder gets of each caption, and how many it reads."""

    limit: int
    """Tokens that are read; the rest of a longer caption is cut off."""
    counts: Sequence[int]
    """Tokens of each caption, those at its beginning and end included."""

    @property
    def too_long(self) -> int:
        """The number of captions that are cut off."""
        return sum(count > self.limit for count in self.counts)


def token_counts(
    folder: Path, captions: Sequence[str], left_out: Collection[str], longest: int | None
) -> dict[str, TokenCounts]:
    """Name of each tokenizer in ``folder`` -> its counts. A tokenizer that cannot be read is left out.

    CLIP's encoders have a length of their own; all others read ``longest`` tokens, if it is given.
    """
    from transformers import AutoTokenizer

    found = {}
    for place in sorted(folder.glob("*/tokenizer_config.json")):
        name = place.parent.name
        if name in left_out or encoder_of(name) is None:
            continue
        with quiet():
            try:
                tokenizer = AutoTokenizer.from_pretrained(place.parent, local_files_only=True)
            except (OSError, ValueError):
                continue  # loading the model reports what is wrong with it
            counts: list[int] = []
            for start in range(0, len(captions), CHUNK):
                chunk = [*captions[start : start + CHUNK]]
                counts += map(len, tokenizer(chunk, truncation=False, verbose=False)["input_ids"])
        clip = "clip" in type(tokenizer).__name__.lower()
        limit = tokenizer.model_max_length if clip or longest is None else longest
        found[name] = TokenCounts(limit, counts)
    return found
