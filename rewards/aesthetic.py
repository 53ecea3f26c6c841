"""Aesthetic: scores an image's beauty, regardless of the prompt, by LAION's improved aesthetic predictor.

Source: github.com/christophschuhmann/improved-aesthetic-predictor, weights sac+logos+ava1-l14-linearMSE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.rewards._clip import CLIP_L, CLIP_L_WEIGHTS, in_batches, load_clip, load_pixels
from posttrain.rewards._neural import Neural
from posttrain.rewards._state import frozen, linear_head, read
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class Aesthetic(Neural):
    """A linear function of the image's normalised CLIP ViT-L/14 features, typically about 5.4.

    It was fitted to people's ratings from 1 to 10.
    """

    type: Literal["aesthetic"] = "aesthetic"
    range: ClassVar = (-float("inf"), float("inf"))

    weights: ClassVar = {
        "path": CLIP_L_WEIGHTS,
        "head": Weights(("aesthetic-model.pth",), 3_714_000, "Apache-2.0"),
    }

    path: str = CLIP_L
    """CLIP's weights and image preprocessing: a hub name or a folder."""
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    """The head: a hub name, or a file such as LAION's own ``sac+logos+ava1-l14-linearMSE.pth``. The default
    repository has the same weights in a file of another name."""

    def scorer(self, device: torch.device) -> Scorer:
        import torch

        folder, file = self.located("path"), self.located("head")
        pixels, clip = load_pixels(folder), load_clip(folder, folder, device)
        head = frozen(linear_head(read(file), clip.model.config.projection_dim, file), device)

        def score_batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
            del prompts
            return head(torch.nn.functional.normalize(clip.of_images(pixels(images)))).squeeze(1)

        return in_batches(score_batch, self.batch_size)
