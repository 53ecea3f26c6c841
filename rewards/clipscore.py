"""CLIPScore: does the image show what the prompt says (Hessel et al. 2021, arXiv:2104.08718)?"""

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
"""By which the published tables divide CLIP's logits; CLIP ViT-L's own scale, so that a cosine remains."""


class CLIPScore(Neural):
    """The cosine of image and prompt under OpenAI's CLIP ViT-L/14 (about 0.28)."""

    type: Literal["clipscore"] = "clipscore"
    range: ClassVar = (-1.0, 1.0)

    weights: ClassVar = {"path": CLIP_L_WEIGHTS}

    path: str = CLIP_L
    """Weights and tokenizer: a hub name or a folder."""

    def scorer(self, device: torch.device) -> Scorer:
        folder = self.located("path")
        clip = load_clip(folder, folder, device)

        def some(images: Tensor, prompts: Sequence[str]) -> Tensor:
            # of floats and bilinear, unlike CLIP's own preprocessing: so the published tables have it
            return clip.logits(by_shorter_side(images.to(device), clip.image_size), prompts) / SCALE

        return in_batches(some, self.batch_size)
