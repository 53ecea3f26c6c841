"""Makes tokenizers for a small closed vocabulary, with one token for each word."""

from __future__ import annotations

import json
import tempfile
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError

START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(words: list[str], length: int) -> Any:
    """A CLIP tokenizer in the published format that gives each of ``words`` one token.

    Prompts have ``length`` tokens. Raises ModelError if a word cannot be one token.
    """
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = _merges(words)
    vocabulary = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END]
    with tempfile.TemporaryDirectory() as folder:
        numbers = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
        Path(folder, "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
        Path(folder, "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length, pad_token=END)
    for word in words:
        if len(ids := tokenizer(word).input_ids) != 3:
            raise ModelError(f"the word {word!r} became {len(ids) - 2} tokens, not one")
    return tokenizer


def t5_tokenizer(words: list[str], length: int) -> Any:
    """A T5 tokenizer that gives each of ``words`` one piece. Prompts have ``length`` tokens."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(chr(c), -10.0) for c in range(ord("a"), ord("z") + 1)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5TokenizerFast(vocab=pieces, model_max_length=length, extra_ids=0)


def qwen_tokenizer(words: list[str], length: int) -> Any:
    """A Qwen tokenizer, whose letters are bytes, that gives each of ``words`` one token, also after a space.

    Prompts have at most ``length`` tokens. ``<|im_start|>`` and ``<|im_end|>`` are special tokens.
    """
    from transformers import Qwen2Tokenizer

    texts = [f"{word} {word}" for word in words]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([texts], vocab_size=10_000, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.model_max_length = length
    return tokenizer


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that grow each word letter by letter from its beginning."""
    merges: dict[tuple[str, str], set[tuple[str, str]]] = {}
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    steps = [[("".join(word[:k]), word[k]) for k in range(1, len(word))] for word in spelled]
    for word in steps:
        for step in word:
            merges.setdefault(step, set())
    for word, letters in zip(steps, spelled, strict=True):
        for k, step in enumerate(word, start=1):
            # a merge inside the rest of the word must not come before the one that grows its prefix
            for inner in zip(letters[k:], letters[k + 1 :], strict=False):
                if inner in merges:
                    merges[inner].add(step)
    return list(TopologicalSorter(merges).static_order())
