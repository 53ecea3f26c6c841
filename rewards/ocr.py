"""Can the words that a prompt puts in quotes be read in the image?

Flow-GRPO's reward (arXiv:2505.05470, section 5.1), with RapidOCR (PP-OCR models that come with the package)
instead of PaddleOCR, so scores are comparable with published ones, not identical.
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
    """1 where the text between the prompt's first pair of double quotes is found in what was read, else 1
    less the edit distance to it, over its length; spaces and case do not count."""

    type: Literal["ocr"] = "ocr"
    range: ClassVar = (0.0, 1.0)
    requires: ClassVar = ("rapidocr", "onnxruntime", "rapidfuzz")

    def unusable(self, row: Mapping[str, Any]) -> str | None:
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
                # images are enlarged to no more than this: 736, the default, takes 5 times as long
                "Det.limit_side_len": 128,
                "Det.limit_type": "min",
            }
        )

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            values = []
            for image, prompt in zip(to_pil(images), prompts, strict=True):
                if (target := quoted(prompt)) is None:
                    raise ValueError(f"no text between double quotes in {prompt!r}")
                found = read(image, use_det=True, use_cls=False, use_rec=True)
                values.append(similarity(target, "".join(found.txts or ())))
            return Scores(torch.tensor(values))

        return score


def quoted(prompt: str) -> str | None:
    """What stands between the first two double quotes, if anything does."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 2 else None


def normalised(text: str) -> str:
    """``text`` without spaces, in lower case."""
    return text.replace(" ", "").lower()


def similarity(target: str, recognized: str) -> float:
    """1 - min(d, length) / length in [0, 1]: d is 0 where the target is contained in what was recognized,
    else their edit distance; length is the target's, without spaces."""
    from rapidfuzz.distance import Levenshtein

    target, recognized = normalised(target), normalised(recognized)
    if target in recognized:
        return 1.0
    return 1 - min(Levenshtein.distance(target, recognized), len(target)) / len(target)
