"""Shapes: scores scenes of coloured shapes by GenEval's rules, with a detector that needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.reward import Reward, Scores
from posttrain.rewards._geneval_scores import Verdict, metadata_problem, scores, unknown
from posttrain.shapes.scene import COLORS, SHAPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class Shapes(Reward):
    """GenEval's verdict on the shapes, counts, colours and positions that the prompt asks for.

    Prompts need GenEval's metadata, which ``posttrain shapes build`` writes. The two verdicts that ``score``
    does not choose are details.
    """

    type: Literal["shapes"] = "shapes"
    range: ClassVar = (0.0, 1.0)

    score: Verdict = "graded"
    """``graded``: the mean credit of the counts, colours and positions asked for, at least 0; ``strict``: 1
    if exactly what was asked for is there; ``lenient``: GenEval's own verdict."""

    def prompt_problem(self, row: Mapping[str, Any]) -> str | None:
        reason = metadata_problem(row) or unknown(row, "the detector", SHAPES, COLORS)
        return None if reason is None else f"shapes: {reason}"

    def load(self, device: torch.device) -> Scorer:
        del device  # plain image analysis on the CPU
        return self._scores

    def _scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        from posttrain.shapes.detect import detect

        for prompt, task in zip(prompts, metadata, strict=True):
            if (reason := self.prompt_problem(task)) is not None:
                raise ValueError(f"prompt {prompt!r} cannot be judged: {reason}")
        detections = [detect(image) for image in images.float().cpu().numpy()]
        judged = scores(detections, metadata, self.score)
        # the graded score falls without bound: one crowded image would weigh as much as several good ones
        details = {name: values.clamp(min=0) for name, values in judged.details.items()}
        return Scores(judged.value.clamp(min=0), details)
