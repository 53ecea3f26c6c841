"""GenEval: scores whether an image shows the objects, counts, colours and positions that its prompt asks for.

The rules are those of Ghosh et al. 2023 (arXiv:2310.11513). Mask2Former (Swin-S, COCO instances) finds the
objects. It has the architecture of the published detector but comes from another training run, so scores are
comparable with published ones, not identical. CLIP ViT-L/14 names the colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from posttrain.registry import FREE
from posttrain.reward import Scores
from posttrain.rewards._clip import CLIP_L, CLIP_L_WEIGHTS, load_clip
from posttrain.rewards._colors import COLORS, colored, load_colors
from posttrain.rewards._detector import CLASSES, load_detector
from posttrain.rewards._geneval_scores import Verdict, metadata_problem, scores, unknown
from posttrain.rewards._neural import Neural
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class GenEval(Neural):
    """How far real images show what the prompt asks for, by GenEval's rules. Published tables have
    ``lenient``, GenEval's own verdict; scores are comparable with theirs, not identical.

    Prompts need GenEval's metadata: ``tag``, ``include`` and, if need be, ``exclude``. The two verdicts that
    ``score`` does not choose are details.
    """

    type: Literal["geneval"] = "geneval"
    range: ClassVar = (-float("inf"), 1.0)

    weights: ClassVar = {
        "detector": Weights(
            # the pattern matches both formats in which repositories have weights
            ("config.json", "*model.*"),
            553_000_000,
            "unclear: its code is MIT, its model zoo says CC BY-NC 4.0",
        ),
        "clip": CLIP_L_WEIGHTS,
    }

    score: Verdict = "graded"
    """``graded``: the mean credit of the counts, colours and positions asked for, negative if there are far
    too many objects; ``strict``: 1 if exactly what was asked for is there; ``lenient``: GenEval's own
    verdict."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A Mask2Former that knows COCO's 80 classes: a hub name or a folder."""
    clip: str = CLIP_L
    """The CLIP that names colours, with its tokenizer: a hub name or a folder."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Objects count if the detector's score is above this."""
    counting_threshold: float = Field(default=0.9, ge=0, lt=1)
    """The threshold for prompts whose tag is ``counting``."""
    max_objects: int = Field(default=16, ge=1)
    """At most this many objects of a class count."""
    shorter_side: int = Field(default=800, ge=32)
    """Images are resized before detection: the shorter side to this many pixels."""
    longer_side: int = Field(default=1333, ge=32)
    """If the longer side would exceed this many pixels, the image is resized by the longer side instead."""
    batch_size: Annotated[int, FREE] = Field(default=4, ge=1)
    """Images in one forward of the detector."""

    def prompt_problem(self, row: Mapping[str, Any]) -> str | None:
        if (reason := metadata_problem(row)) is not None:
            return f"geneval: {reason}"
        if "tag" not in row:
            return "geneval: it has no 'tag', which sets how sure the detector has to be"
        reason = unknown(row, "the detector", CLASSES, COLORS)
        return None if reason is None else f"geneval: {reason}"

    def scorer(self, device: torch.device) -> Scorer:
        from posttrain.support.images import to_pil

        sides = (self.shorter_side, self.longer_side)
        detect = load_detector(self.located("detector"), sides, self.max_objects, device)
        folder = self.located("clip")
        classify = load_colors(load_clip(folder, folder, device))

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            for prompt, task in zip(prompts, metadata, strict=True):
                if (reason := self.prompt_problem(task)) is not None:
                    raise ValueError(f"prompt {prompt!r} cannot be judged: {reason}")
            detections = []
            for start in range(0, len(prompts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                pictures, tasks = to_pil(images[batch]), metadata[batch]
                each = zip(pictures, detect(pictures, self._thresholds(tasks)), tasks, strict=True)
                detections += [colored(picture, objects, task, classify) for picture, objects, task in each]
            return scores(detections, metadata, self.score)

        return score

    def _thresholds(self, tasks: Sequence[Mapping[str, Any]]) -> list[float]:
        counting = self.counting_threshold
        return [counting if task["tag"] == "counting" else self.threshold for task in tasks]
