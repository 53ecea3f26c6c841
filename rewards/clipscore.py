"""CLIPScore: scores how well the image shows what the prompt says (Hessel et al. 2021, arXiv:2104.08718)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.rewards._clip import CLIP_L, CLIP_L_WEIGHTS, in_batches, load_clip
from posttrain.rewards._neural import Neural
from posttrain.rewards._pixels import by_shorter_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from posttrain.reward import Scorer

SCALE = 100
"""Published tables divide CLIP's logits by this. It is ViT-L/14's own scale, so the result is a cosine."""


class CLIPScore(Neural):
    """The cosine between image and prompt in OpenAI's CLIP ViT-L/14, typically about 0.28."""

    type: Literal["clipscore"] = "clipscore"
    range: ClassVar = (-1.0, 1.0)

    weights: ClassVar = {"path": CLIP_L_WEIGHTS}

    path: str = CLIP_L
    """Weights and tokenizer: a hub name or a folder."""

    def scorer(self, device: torch.device) -> Scorer:
        folder = self.located("path")
        clip = load_clip(folder, folder, device)

        def score_batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
            # the published tables resize floats bilinearly, unlike CLIP's own preprocessing
            return clip.logits(by_shorter_side(images.to(device), clip.image_size), prompts) / SCALE

        return in_batches(score_batch, self.batch_size)
