"""GenEval: does the image show the objects, counts, colours and places of its prompt?

Objects are found by Mask2Former (Swin-S, COCO instances): the architecture of the published detector, but
another training run of it, so scores are comparable with published ones, not identical. Colours are CLIP
ViT-L/14's, and the rules those of Ghosh et al. 2023 (arXiv:2310.11513).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.reward import Scores
from posttrain.rewards._clip import CLIP_L, CLIP_L_WEIGHTS, load_clip
from posttrain.rewards._colors import COLORS, colored, load_colors
from posttrain.rewards._detector import CLASSES, load_detector
from posttrain.rewards._geneval_scores import Verdict, metadata_problem, scores
from posttrain.rewards._neural import Neural
from posttrain.support.spelling import meant
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class GenEval(Neural):
    """GenEval's verdict on real images, with a detector of the same architecture as the published one but of
    another training run: comparable with published scores, not identical.

    Needs GenEval's metadata (``tag``, ``include``, ``exclude``). The two verdicts that ``score`` does not
    pick are shown as details.
    """

    type: Literal["geneval"] = "geneval"
    range: ClassVar = (-float("inf"), 1.0)

    weights: ClassVar = {
        "detector": Weights(
            # in whichever of two formats the repository has them
            ("config.json", "*model.*"),
            553_000_000,
            "unclear: its code is MIT, its model zoo says CC BY-NC 4.0",
        ),
        "clip": CLIP_L_WEIGHTS,
    }

    score: Verdict = "graded"
    """``graded``: how far each thing asked for is there, negative where there are far too many;
    ``strict``: exactly what was asked for; ``lenient``: GenEval's own verdict."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A Mask2Former that knows COCO's 80 classes: a hub name or a folder."""
    clip: str = CLIP_L
    """The CLIP that tells colours, with its tokenizer: a hub name or a folder."""
    threshold: float = Field(0.3, ge=0, lt=1)
    """What an object's score must be above."""
    counting_threshold: float = Field(0.9, ge=0, lt=1)
    """The same where the prompt's tag is ``counting``."""
    max_objects: int = Field(16, ge=1)
    """Most objects of a class that count."""
    shorter_side: int = Field(800, ge=32)
    """Pixels that the shorter side of an image is made before detection, if the longer allows it."""
    longer_side: int = Field(1333, ge=32)
    """Most pixels of the longer side."""
    batch_size: int = Field(4, ge=1)
    """Images that go through the detector at a time."""

    def unusable(self, row: Mapping[str, Any]) -> str | None:
        if (reason := metadata_problem(row)) is not None:
            return f"geneval: {reason}"
        if "tag" not in row:
            return "geneval: it has no 'tag', which sets how sure the detector has to be"
        for clause in (*row["include"], *row.get("exclude", ())):
            if (kind := clause["class"]) not in CLASSES:
                return f"geneval: the detector knows no {kind!r}{meant(kind, CLASSES)}"
            if (color := clause.get("color", COLORS[0])) not in COLORS:
                return f"geneval: {color!r} is none of the colours {', '.join(COLORS)}"
        return None

    def scorer(self, device: torch.device) -> Scorer:
        from posttrain.support.images import to_pil

        sides = (self.shorter_side, self.longer_side)
        detect = load_detector(self.located("detector"), sides, self.max_objects, device)
        folder = self.located("clip")
        classify = load_colors(load_clip(folder, folder, device))

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            for prompt, task in zip(prompts, metadata, strict=True):
                if (reason := self.unusable(task)) is not None:
                    raise ValueError(f"prompt {prompt!r} cannot be judged: {reason}")
            found = []
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                pictures, tasks = to_pil(images[part]), metadata[part]
                each = zip(pictures, detect(pictures, self._least(tasks)), tasks, strict=True)
                found += [colored(picture, objects, task, classify) for picture, objects, task in each]
            return scores(found, metadata, self.score)

        return score

    def _least(self, tasks: Sequence[Mapping[str, Any]]) -> list[float]:
        counting = self.counting_threshold
        return [counting if task["tag"] == "counting" else self.threshold for task in tasks]
