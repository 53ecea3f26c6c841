"""Shapes: GenEval's rules on scenes of coloured shapes, with a detector that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain.reward import Reward, Scores
from posttrain.rewards._geneval import graded, lenient, strict

if TYPE_CHECKING:
    from posttrain.reward import Scorer


class Shapes(Reward):
    """Does the image show the shapes, counts, colours and places of its prompt?

    Needs GenEval-format metadata (``posttrain shapes build`` writes it, Shapes prompts have it). The two
    verdicts that ``score`` does not pick are shown as details.
    """

    type: Literal["shapes"] = "shapes"
    range: ClassVar = (-float("inf"), 1.0)

    score: Literal["graded", "lenient", "strict"] = "graded"
    """``graded``: how far each thing asked for is there, negative where there are far too many;
    ``strict``: exactly what was asked for; ``lenient``: GenEval's own verdict."""

    def unusable(self, row: Mapping[str, Any]) -> str | None:
        return None if "include" in row else "shapes: it has no GenEval metadata ('include') to judge by"

    def load(self, device: torch.device) -> Scorer:
        del device  # plain image analysis on the CPU
        return self._scores

    def _scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        from posttrain.shapes.detect import detect

        verdicts: dict[str, list[float]] = {"graded": [], "lenient": [], "strict": []}
        for image, prompt, task in zip(images.float().cpu().numpy(), prompts, metadata, strict=True):
            if "include" not in task:
                raise ValueError(
                    f"prompt {prompt!r} has no GenEval metadata ('include'), so there is nothing to judge"
                )
            objects = detect(image)
            verdicts["graded"].append(graded(objects, task))
            verdicts["lenient"].append(float(lenient(objects, task)))
            verdicts["strict"].append(float(strict(objects, task)))
        tensors = {name: torch.tensor(values) for name, values in verdicts.items()}
        return Scores(tensors.pop(self.score), tensors)
