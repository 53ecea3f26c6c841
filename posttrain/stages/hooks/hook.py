"""The interface of a hook: two moments of a stage at which it may act."""

from __future__ import annotations

from torch import Tensor


class Hook:
    """Acts between batches, after optimizer steps, or both. Override what you need.

    Every process calls the same hooks in the same order, so a hook may use the collectives of the world.
    A hook must not draw random numbers from a global generator: a resumed stage would differ.
    """

    def between_batches(self, step: int, *, last: bool) -> bool:
        """Act after ``step`` finished optimizer steps, before the next batch is drawn.

        ``last`` says that the stage has taken all its steps. The time is not counted as training. Returns
        False to end the stage here and publish its weights; the hooks after this one are then not called.
        All processes must return the same.
        """
        del step, last
        return True

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        """Act after optimizer step ``step`` (from 1), which used ``samples`` samples.

        ``metrics`` are on the device: scalars, and vectors (n,) to be recorded as histograms.
        """
        del step, samples, metrics
