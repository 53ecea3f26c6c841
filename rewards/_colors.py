"""Which colour is an object: what does CLIP make of it, cut out on grey?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from posttrain.rewards._pixels import of_pil

if TYPE_CHECKING:
    from PIL import Image

    from posttrain.rewards._clip import Clip
    from posttrain.rewards._detector import Found

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {kind}",
    "a photo of a {color}-colored {kind}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"

Classifier = Callable[[Sequence["Image.Image"], str], list[str]]
"""(cut-outs, the class of all of them) -> the colour of each."""


def load_colors(clip: Clip) -> Classifier:
    """CLIP's own choice among the colours, each the mean of its sentences."""

    @cache
    def directions(kind: str) -> Tensor:
        texts = [clip.of_texts([t.format(color=c, kind=kind) for t in TEMPLATES]) for c in COLORS]
        return normalize(torch.stack([normalize(t).mean(0) for t in texts]))

    def classify(crops: Sequence[Image.Image], kind: str) -> list[str]:
        with torch.no_grad():
            features = clip.of_images(of_pil(crops, clip.image_size))
            return [COLORS[i] for i in (features @ directions(kind).T).argmax(1).tolist()]

    return classify


def colored(image: Image.Image, found: Found, task: Mapping[str, Any], classify: Classifier) -> Found:
    """``found`` with the ``color`` of each object of those classes that ``task`` asks a colour of."""
    asked = {clause["class"] for clause in task["include"] if "color" in clause}
    result = dict(found)
    for kind in asked & found.keys():
        colors = classify([cut_out(image, d) for d in found[kind]], kind)
        result[kind] = [d | {"color": c} for d, c in zip(found[kind], colors, strict=True)]
    return result


def cut_out(image: Image.Image, detection: Mapping[str, Any]) -> Image.Image:
    """The detection's box, grey wherever its mask is not."""
    from PIL import Image

    blank = Image.new("RGB", image.size, BACKGROUND)
    x0, y0, x1, y1 = map(int, detection["box"])
    return Image.composite(image, blank, Image.fromarray(detection["mask"])).crop((x0, y0, x1, y1))
