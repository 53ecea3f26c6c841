"""Finds COCO's objects in images with Mask2Former (Cheng et al. 2022, arXiv:2112.01527).

Objects are kept by the rules of GenEval's detector. An object's score is the query's class probability times
the mean probability of its mask. Its box is that of the mask. Overlapping objects are not suppressed.
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
"""COCO's 80 classes, as GenEval's prompts name them."""
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
"""A detector's name of a class -> GenEval's. These are COCO's own names, and those of older label files."""

Detections = dict[str, list[dict[str, Any]]]
"""Class -> the objects found in an image, best first.

Each has ``box`` (x0, y0, x1, y1) in pixels, ``score`` in [0, 1] and ``mask`` (h, w) bool.
"""
Detector = Callable[[Sequence["Image.Image"], Sequence[float]], list[Detections]]
"""A function (images of one size, the threshold of each image's scores) -> the detections in each."""


def load_detector(folder: Path, sides: tuple[int, int], most: int, device: torch.device) -> Detector:
    """Load the detector in ``folder``.

    It enlarges or shrinks an image to the first of ``sides`` by the shorter side, unless the longer side then
    exceeds the second; both are in pixels. It returns at most ``most`` objects of a class. Raises RewardError
    if it does not know all of :data:`CLASSES`.
    """
    from transformers import Mask2FormerImageProcessorPil

    from posttrain.rewards._mask2former import Segmenter

    # made here and not read from the folder, whose file may give a size other than the published one;
    # AutoImageProcessor would choose by whether torchvision is installed, and the pixels would differ
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": sides[0], "longest_edge": sides[1]})
    model = loaded(Segmenter, folder, device)
    names = _names(model.config.id2label, folder)

    def detect(images: Sequence[Image.Image], thresholds: Sequence[float]) -> list[Detections]:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        with torch.no_grad():
            output = model(pixels)
        detections = []
        for image, classes, masks, threshold in zip(images, *output, thresholds, strict=True):
            sizes = tuple(pixels.shape[-2:]), (image.height, image.width)
            kept, scores, labels = instances(classes, masks, sizes, threshold)
            detections.append(named(kept, scores, labels, names, threshold, most))
        return detections

    return detect


def instances(
    classes: Tensor, masks: Tensor, sizes: Sequence[tuple[int, int]], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The masks (k, h, w) bool, scores (k,) and labels (k,) of the objects in one image.

    ``classes`` (queries, labels + 1) and ``masks`` (queries, a, b) are logits. The masks are resized to each
    (height, width) of ``sizes`` in turn. Objects whose class probability is not above ``threshold`` are left
    out before the resizing, since the mask can only lower the score.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    label_count = probabilities.shape[1]
    scores, indices = probabilities.flatten().topk(min(len(classes), probabilities.numel()))
    indices, scores = indices[scores > threshold], scores[scores > threshold]
    logits = masks[indices // label_count]
    for height, width in sizes:
        if not len(logits):  # interpolate refuses an empty tensor
            logits = logits.new_zeros(0, height, width)
        elif logits.shape[-2:] != (height, width):
            logits = interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    mask_scores = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    return inside.cpu(), (scores * mask_scores).cpu(), (indices % label_count).cpu()


def named(
    masks: Tensor, scores: Tensor, labels: Tensor, names: Mapping[int, str], threshold: float, most: int
) -> Detections:
    """The objects that score above ``threshold``, at most ``most`` of each class, by GenEval's names."""
    by_class: Detections = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        detections = by_class.setdefault(names[int(labels[i])], [])
        if scores[i] > threshold and len(detections) < most and masks[i].any():
            (x0, x1), (y0, y1) = _extent(masks[i].any(0)), _extent(masks[i].any(1))
            detections.append({"box": [x0, y0, x1, y1], "score": float(scores[i]), "mask": masks[i].numpy()})
    return {name: detections for name, detections in by_class.items() if detections}


def _extent(line: Tensor) -> tuple[float, float]:
    """The first index that is set in ``line`` (n,) bool, and the one after the last."""
    indices = line.nonzero()
    return float(indices[0]), float(indices[-1]) + 1


def _names(id2label: Mapping[int, str], folder: Path) -> dict[int, str]:
    """Label -> GenEval's name. Raises RewardError if a class is unknown to the detector."""
    names = {label: SPELLINGS.get(name, name) for label, name in id2label.items()}
    if unknown := [name for name in CLASSES if name not in names.values()]:
        first = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3} more" if unknown[3:] else "")
        raise RewardError(
            f"the detector in {str(folder)!r} does not know {first}, so it cannot judge GenEval"
        )
    return names
