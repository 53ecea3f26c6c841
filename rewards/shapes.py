"""Shapes: GenEval's rules on scenes of coloured shapes, with a detector that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.reward import Reward, Scores
from posttrain.rewards._geneval_scores import Verdict, metadata_problem, scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class Shapes(Reward):
    """Does the image show the shapes, counts, colours and places of its prompt?

    Needs GenEval-format metadata (``posttrain shapes build`` writes it, Shapes prompts have it). The two
    verdicts that ``score`` does not pick are shown as details.
    """

    type: Literal["shapes"] = "shapes"
    range: ClassVar = (-float("inf"), 1.0)

    score: Verdict = "graded"
    """``graded``: how far each thing asked for is there, negative where there are far too many;
    ``strict``: exactly what was asked for; ``lenient``: GenEval's own verdict."""

    def unusable(self, row: Mapping[str, Any]) -> str | None:
        return None if (reason := metadata_problem(row)) is None else f"shapes: {reason}"

    def load(self, device: torch.device) -> Scorer:
        del device  # plain image analysis on the CPU
        return self._scores

    def _scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        from posttrain.shapes.detect import detect

        for prompt, task in zip(prompts, metadata, strict=True):
            if (reason := metadata_problem(task)) is not None:
                raise ValueError(f"prompt {prompt!r} cannot be judged: {reason}")
        found = [detect(image) for image in images.float().cpu().numpy()]
        return scores(found, metadata, self.score)
