"""OCR: scores whether the words that the prompt puts in quotes can be read in the image.

This is Flow-GRPO's reward (arXiv:2505.05470, section 5.1). RapidOCR, with the PP-OCR models of its package,
replaces PaddleOCR, so scores are comparable with published ones, not identical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    from posttrain.reward import Scorer


class OCR(Reward):
    """How well the text between the prompt's first pair of double quotes can be read in the image.

    1 if the recognized text contains it, else 1 minus their edit distance over its length, at least 0. Spaces
    and case are ignored.
    """

    type: Literal["ocr"] = "ocr"
    range: ClassVar = (0.0, 1.0)
    requires: ClassVar = ("rapidocr", "onnxruntime", "rapidfuzz")

    def prompt_problem(self, row: Mapping[str, Any]) -> str | None:
        text = quoted(row["prompt"])
        if text is None:
            return 'ocr: there is no text between double quotes ("...") to be read'
        return None if normalised(text) else "ocr: the text between the double quotes is empty"

    def load(self, device: torch.device) -> Scorer:
        del device  # the models are small and run on the CPU
        from rapidocr import RapidOCR

        from posttrain.support.images import to_pil

        read: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                # smaller images are enlarged to this; the default of 736 takes 5 times as long
                "Det.limit_side_len": 128,
                "Det.limit_type": "min",
            }
        )

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            values = []
            for image, prompt in zip(to_pil(images), prompts, strict=True):
                if (target := quoted(prompt)) is None:
                    raise ValueError(f"no text between double quotes in {prompt!r}")
                output = read(image, use_det=True, use_cls=False, use_rec=True)
                values.append(similarity(target, "".join(output.txts or ())))
            return Scores(torch.tensor(values))

        return score


def quoted(prompt: str) -> str | None:
    """The text between the first two double quotes of ``prompt``; None if there are fewer than two."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 2 else None


def normalised(text: str) -> str:
    """``text`` without spaces and line breaks, in lower case."""
    return "".join(text.split()).lower()


def similarity(target: str, recognized: str) -> float:
    """The score 1 - min(d, length) / length, in [0, 1].

    ``length`` is the number of characters in ``target``, without spaces. ``d`` is 0 if ``recognized``
    contains ``target``, else their edit distance.
    """
    from rapidfuzz.distance import Levenshtein

    target, recognized = normalised(target), normalised(recognized)
    if target in recognized:
        return 1.0
    return 1 - min(Levenshtein.distance(target, recognized), len(target)) / len(target)
