"""PickScore: scores which image people would prefer for the prompt.

Source: Kirstain et al. 2023, arXiv:2305.01569, and the published weights PickScore_v1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.rewards._clip import in_batches, load_clip, load_pixels
from posttrain.rewards._neural import Neural
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    import torch

    from posttrain.reward import Scorer

SCALE = 26
"""Flow-GRPO, DiffusionNFT and SOAR divide by this in training. Their tables show the undivided score."""


class PickScore(Neural):
    """The scaled cosine between image and prompt in a CLIP ViT-H tuned on people's choices, divided by 26.

    It is typically about 0.86. Published tables show 26 times that, about 22.
    """

    type: Literal["pickscore"] = "pickscore"
    range: ClassVar = (-100 / SCALE, 100 / SCALE)

    weights: ClassVar = {
        "path": Weights(("config.json", "model.safetensors"), 3_944_517_836, "MIT"),
        "processor": Weights(("preprocessor_config.json", "tokenizer*.json"), 3_644_497, "MIT"),
    }

    path: str = "yuvalkirstain/PickScore_v1"
    """Weights: a hub name or a folder."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Tokenizer and image preprocessing: a hub name or a folder."""

    def scorer(self, device: torch.device) -> Scorer:
        processor = self.located("processor")
        pixels = load_pixels(processor)
        clip = load_clip(self.located("path"), processor, device)
        return in_batches(
            lambda images, prompts: clip.logits(pixels(images), prompts) / SCALE, self.batch_size
        )
