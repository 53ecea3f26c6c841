"""Which of COCO's objects are in an image, and where (Mask2Former, Cheng et al. 2022, arXiv:2112.01527)?

The rules of keeping an object are those of GenEval's detector: a query's class scores are its own, each times
how sure the network is of the mask; boxes are those of the masks; nothing is suppressed for overlapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from posttrain.errors import RewardError
from posttrain.rewards._state import loaded

if TYPE_CHECKING:
    from PIL import Image

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 as GenEval's prompts name them."""
SPELLINGS = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""What detectors call them -> what GenEval does: COCO's own names, and those of older label files."""

Found = dict[str, list[dict[str, Any]]]
"""Class -> detections, best first, each with ``box`` (x0, y0, x1, y1), ``score`` and ``mask`` (h, w)."""
Detector = Callable[[Sequence["Image.Image"], Sequence[float]], list[Found]]
"""(images of one size, the least score for each) -> what is in them."""


def load_detector(folder: Path, sides: tuple[int, int], most: int, device: torch.device) -> Detector:
    """The detector in ``folder``, which sees images at most as large as ``sides`` (the shorter, the longer)
    and names at most ``most`` objects a class."""
    from transformers import Mask2FormerImageProcessorPil

    from posttrain.rewards._mask2former import Segmenter

    # the size that the network was trained and published for, whatever a repository's file says; by name,
    # so that machines with and without torchvision see the same pixels
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": sides[0], "longest_edge": sides[1]})
    model = loaded(Segmenter, folder, device)
    names = _names(model.config.id2label, folder)

    def detect(images: Sequence[Image.Image], least: Sequence[float]) -> list[Found]:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        with torch.no_grad():
            output = model(pixels)
        found = []
        for image, classes, masks, threshold in zip(images, *output, least, strict=True):
            sizes = tuple(pixels.shape[-2:]), (image.height, image.width)
            kept, scores, labels = instances(classes, masks, sizes, threshold)
            found.append(named(kept, scores, labels, names, threshold, most))
        return found

    return detect


def instances(
    classes: Tensor, masks: Tensor, sizes: Sequence[tuple[int, int]], least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (k, h, w), scores (k,) and labels (k,) of what ``classes`` (queries, labels + 1) and ``masks``
    (queries, a, b), both logits, make out. ``sizes`` are those that the masks are resized to, one by one.

    Objects whose class score alone is not above ``least`` are left out before their masks are made large:
    the mask's part of the score is at most 1.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    count = probabilities.shape[1]
    scores, places = probabilities.flatten().topk(min(len(classes), probabilities.numel()))
    places, scores = places[scores > least], scores[scores > least]
    logits = masks[places // count]
    for height, width in sizes:
        if not len(logits):  # which interpolate refuses
            logits = logits.new_zeros(0, height, width)
        elif logits.shape[-2:] != (height, width):
            logits = interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    sure = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    return inside.cpu(), (scores * sure).cpu(), (places % count).cpu()


def named(
    masks: Tensor, scores: Tensor, labels: Tensor, names: Mapping[int, str], least: float, most: int
) -> Found:
    """The detections that score more than ``least``, the best ``most`` of each class, by GenEval's names."""
    found: Found = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        detections = found.setdefault(names[int(labels[i])], [])
        if scores[i] > least and len(detections) < most and masks[i].any():
            (x0, x1), (y0, y1) = _ends(masks[i].any(0)), _ends(masks[i].any(1))
            detections.append({"box": [x0, y0, x1, y1], "score": float(scores[i]), "mask": masks[i].numpy()})
    return {name: detections for name, detections in found.items() if detections}


def _ends(line: Tensor) -> tuple[float, float]:
    places = line.nonzero()
    return float(places[0]), float(places[-1]) + 1


def _names(id2label: Mapping[int, str], folder: Path) -> dict[int, str]:
    names = {label: SPELLINGS.get(name, name) for label, name in id2label.items()}
    if lacking := [name for name in CLASSES if name not in names.values()]:
        shown = ", ".join(map(repr, lacking[:3])) + (f" and {len(lacking) - 3} more" if lacking[3:] else "")
        raise RewardError(
            f"the detector in {str(folder)!r} does not know {shown}, so it cannot judge GenEval"
        )
    return names
