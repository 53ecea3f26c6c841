"""The interface of a hook: the moments of a stage at which it may act."""

from __future__ import annotations

from torch import Tensor

from posttrain.errors import StepRefused


class Hook:
    """Acts between batches, after optimizer steps, or when the stage is stopped. Override what you need.

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

    def refused(self, step: int, error: StepRefused) -> None:
        """Act after step ``step``, in place of :meth:`after_step`, if it was not taken. All processes have
        the same ``error``, each with its own samples."""
        del step, error

    def stop(self, step: int) -> None:
        """Act when a signal stops the stage after ``step`` finished optimizer steps, of which there is one at
        least. A batch, or a call of ``between_batches``, may have been given up.
        """
        del step
