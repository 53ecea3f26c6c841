"""Reads the tokenizer of a processor of texts and images, which needs no library for images then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def load_text_processor(folder: Path) -> Any:
    """The processor of a Qwen model in ``folder``, for texts alone. Raises OSError or ValueError if its
    tokenizer cannot be read."""
    from transformers import AutoTokenizer

    # the folder need not say which tokenizer it holds, because the processor's class does
    return text_processor(AutoTokenizer.from_pretrained(folder, tokenizer_type="qwen2"))


def text_processor(tokenizer: Any) -> Any:
    """What stands in for a processor of transformers, such as Qwen3VLProcessor, that has this ``tokenizer``.
    The true one needs torchvision, for images and videos."""
    from transformers import ProcessorMixin

    class TextProcessor(ProcessorMixin):  # diffusers asks for this base class
        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[Any]:  # type: ignore[override]
            """The text or the tokens of one conversation, in a list, as a processor gives them."""
            return [tokenizer.apply_chat_template(messages, **options)]

        def __call__(self, text: Sequence[str], **options: Any) -> Any:  # type: ignore[override]
            """``input_ids`` and ``attention_mask`` of the texts."""
            return tokenizer(text, **options)

    return TextProcessor()
