"""Scores how colourful an image is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    from posttrain.reward import Scorer


class Colorfulness(Reward):
    """The colourfulness that people see (Hasler and Suesstrunk 2003): 0 is grey, 33 moderate, 82 high.

    std + 0.3 mean of red - green and (red + green) / 2 - blue, with values from 0 to 255.
    """

    type: Literal["colorfulness"] = "colorfulness"
    range: ClassVar = (0.0, 376.6)  # 255 sqrt(2 (1 + 0.3^2)), since mean^2 + std^2 <= 255^2

    def load(self, device: torch.device) -> Scorer:
        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            return Scores(colorfulness(images.to(device)))

        return score


def colorfulness(images: Tensor) -> Tensor:
    """(n,) the colourfulness of ``images`` (n, 3, h, w) in [0, 1]."""
    red, green, blue = (255 * images.float().flatten(2)).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    std, mean = torch.std_mean(opponents, dim=2, correction=0)
    return std.norm(dim=0) + 0.3 * mean.norm(dim=0)
