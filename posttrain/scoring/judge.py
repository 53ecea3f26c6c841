"""Scores a stage's samples on a worker thread while the next ones are drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain.algorithm import Batch, Verdict
from posttrain.errors import RewardError
from posttrain.model import FlowModel
from posttrain.scoring.batches import load_scorers
from posttrain.support.files import published
from posttrain.support.images import to_pil
from posttrain.support.worker import Worker

if TYPE_CHECKING:
    from posttrain.reward import Reward, Scorer


CLOSE_SECONDS = 5.0
"""After an error or a signal, a batch that is being scored may take this long; nobody needs its scores."""


class Judge:
    """A stage's rewards and the one thread that computes them; a context manager.

    The caller's thread decodes the latents; the worker thread scores the images.
    """

    def __init__(self, model: FlowModel, rewards: Sequence[Reward], failures: Path) -> None:
        self.model, self.rewards, self.failures = model, rewards, failures
        self.scorers = load_scorers(rewards, model.device)
        self.weights = {r.label: r.weight if r.higher_is_better else -r.weight for r in rewards}
        """Each reward's factor in the weighted sum to maximise; negative for a reward whose lower scores
        are better."""
        self._failed = False
        self._worker = Worker("rewards")

    def submit(self, latents: Tensor, batch: Batch) -> Future[Verdict]:
        """Decode ``latents`` (n, c, h, w), and score the images for the prompts in ``batch.metadata``.

        The future raises RewardError, with the reward's name, if a score cannot be computed: NotFinite if an
        image or a score is not finite. The images and prompts of the first failure are in the folder
        ``failures``.
        """
        images = self.model.decode(latents).float().cpu()
        return self._worker.submit(self._scored, images, batch.metadata)

    def scorers_of(self, rewards: Sequence[Reward]) -> dict[str, Scorer]:
        """The scoring functions of ``rewards``. One that the stage has too is not loaded again, as its
        networks would take the memory twice: call it while no batch is being scored."""
        weighed = [reward.model_copy(update={"weight": 1.0}) for reward in self.rewards]
        new = [r for r in rewards if r.model_copy(update={"weight": 1.0}) not in weighed]
        loaded = load_scorers(new, self.model.device)
        return {r.label: {**self.scorers, **loaded}[r.label] for r in rewards}

    def close(self) -> None:
        """Drop the batches whose scoring has not begun, and wait a little for the one that has."""
        self._worker.close(CLOSE_SECONDS)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scored(self, images: Tensor, rows: Sequence[Any]) -> Verdict:
        prompts = [row["prompt"] for row in rows]
        rewards, details = {}, {}
        try:
            for name, score in self.scorers.items():
                scores = score(images, prompts, rows)
                rewards[name] = scores.value.float().cpu()
                details |= {f"{name}/{key}": v.float().cpu() for key, v in scores.details.items()}
        except RewardError as error:
            if not self._failed:
                self._keep(images, rows)
            self._failed = True
            images_are = f"images and prompts are in {str(self.failures)!r}"
            # a line of its own below the lines of a reward of the user's; else part of the sentence
            where = f"\nIts {images_are}." if "\n" in str(error) else f" (its {images_are})"
            error.args = (f"{error}{where}",)
            raise
        return Verdict(rewards, details)

    def _keep(self, images: Tensor, rows: Sequence[Any]) -> None:
        """Save the images and prompts of a failure, for a person to look at."""
        with published(self.failures) as folder:
            lines = ""
            for i, (row, image) in enumerate(zip(rows, to_pil(images), strict=True)):
                image.save(folder / f"{i:04d}.png")
                lines += json.dumps({**row, "image": f"{i:04d}.png"}) + "\n"
            (folder / "prompts.jsonl").write_text(lines, "utf-8")
