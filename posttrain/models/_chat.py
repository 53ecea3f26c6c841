"""Puts prompts into the chat templates of language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

QWEN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""What the templates of Qwen's models make of a prompt, for counting tokens without the text encoder."""


def chats(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Each of ``prompts`` as a user's turn before the model's, by the tokenizer's own template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]
