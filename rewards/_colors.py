"""Names the colour of detected objects by CLIP, as GenEval does (Ghosh et al. 2023, arXiv:2310.11513).

The object is cut out on a grey background. Colours, sentences and the grey are GenEval's.
"""

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
    from posttrain.rewards._detector import Detections

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {kind}",
    "a photo of a {color}-colored {kind}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"

Classifier = Callable[[Sequence["Image.Image"], str], list[str]]
"""A function (cut-outs, the one class of all of them) -> the colour of each."""


def load_colors(clip: Clip) -> Classifier:
    """A classifier that picks the colour nearest in CLIP's space; a colour is the mean of its sentences."""

    @cache
    def directions(kind: str) -> Tensor:
        texts = [clip.of_texts([t.format(color=c, kind=kind) for t in TEMPLATES]) for c in COLORS]
        return normalize(torch.stack([normalize(t).mean(0) for t in texts]))

    def classify(crops: Sequence[Image.Image], kind: str) -> list[str]:
        with torch.no_grad():
            features = clip.of_images(of_pil(crops, clip.image_size))
            return [COLORS[i] for i in (features @ directions(kind).T).argmax(1).tolist()]

    return classify


def colored(
    image: Image.Image, detections: Detections, task: Mapping[str, Any], classify: Classifier
) -> Detections:
    """Add ``color`` to the detections of each class for which ``task`` asks for a colour."""
    asked = {clause["class"] for clause in task["include"] if "color" in clause}
    result = dict(detections)
    for kind in asked & detections.keys():
        colors = classify([cut_out(image, d) for d in detections[kind]], kind)
        result[kind] = [d | {"color": c} for d, c in zip(detections[kind], colors, strict=True)]
    return result


def cut_out(image: Image.Image, detection: Mapping[str, Any]) -> Image.Image:
    """The detection's box, with everything outside its mask grey."""
    from PIL import Image

    blank = Image.new("RGB", image.size, BACKGROUND)
    x0, y0, x1, y1 = map(int, detection["box"])
    return Image.composite(image, blank, Image.fromarray(detection["mask"])).crop((x0, y0, x1, y1))
