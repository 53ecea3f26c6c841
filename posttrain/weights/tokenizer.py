"""Checks that a tokenizer knows words, and that its text encoder knows the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import ModelError

WORDS = "a photo of a cat"
"""Every tokenizer spells these words at least, if it does not know them."""


def encoder_of(component: str) -> str | None:
    """The text encoder that a pipeline's ``component`` makes tokens for: ``tokenizer_2`` for
    ``text_encoder_2``. None if it makes none. A processor is a tokenizer with more."""
    for kind in ("tokenizer", "processor"):
        if component.startswith(kind):
            return component.replace(kind, "text_encoder", 1)
    return None


def check_tokenizer(tokenizer: Any, folder: Path, encoder: Any = None) -> None:
    """Raise ModelError if the ``tokenizer``, loaded from ``folder``, makes only unknown tokens of words, or
    if the network ``encoder`` has no row for a token or no place for as many tokens as the tokenizer gives.

    A tokenizer whose vocabulary is missing loads without an error, and encodes every caption alike.
    """
    ids = tokenizer(WORDS).input_ids
    if not set(ids) - set(tokenizer.all_special_ids):
        raise ModelError(
            f"the tokenizer in {str(folder)!r} knows no word: {WORDS!r} becomes {len(ids)} special or "
            "unknown tokens. Its vocabulary is missing or damaged"
        )
    most = tokenizer.model_max_length
    if isinstance(most, bool) or not isinstance(most, int | float) or most < 1:
        raise ModelError(
            f"the tokenizer in {str(folder)!r} has {most!r} as model_max_length, not a number of tokens"
        )
    if encoder is None:
        return
    if len(tokenizer) > (rows := encoder.get_input_embeddings().num_embeddings):
        raise ModelError(
            f"the tokenizer in {str(folder)!r} has {len(tokenizer)} tokens, its text encoder knows {rows}"
        )
    places = getattr(encoder.config, "max_position_embeddings", None)
    # rotary positions are computed, not looked up
    rotary = getattr(encoder.config, "rope_parameters", None) is not None
    if places is not None and not rotary and most > places:
        raise ModelError(
            f"the tokenizer in {str(folder)!r} gives up to {most} tokens "
            f"(model_max_length), its text encoder takes {places}"
        )
