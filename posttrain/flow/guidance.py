"""The ways in which a guidance scale acts on a model's velocity.

A model has one of them (:attr:`posttrain.model.FlowModel.guidance_rule`). A new way is a subclass of
:class:`ClassifierFree` in the model's own file.
"""

from __future__ import annotations

from torch import Tensor

from posttrain.errors import ModelError
from posttrain.flow.rectified import guided


class ClassifierFree:
    """v_u + scale (v_c - v_u), from the velocities with the prompt and with the empty prompt (Ho & Salimans
    2022, arXiv:2207.12598). 1 is no guidance."""

    embedded: bool = False
    """Whether the network takes the scale as an input: a tensor ``guidance`` (n,) of its condition."""
    none: float = 1.0
    """The scale that is no guidance, which costs one forward."""
    usual: float | None = None
    """The scale of images for which nothing names one; None if it is the default of
    :class:`posttrain.flow.sampling_settings.Sampling`."""

    def problem(self, scale: float) -> str | None:
        """Why the model cannot be guided by ``scale``; None if it can."""
        del scale
        return None

    def needs_empty_prompt(self, scale: float) -> bool:
        """Whether the velocity needs a second forward, with the empty prompt. Raises ModelError if the model
        cannot be guided by ``scale``."""
        if (reason := self.problem(scale)) is not None:
            raise ModelError(f"guidance {scale:g}: {reason}")
        return scale != self.none

    def trained_at(self, scale: float) -> float:
        """The scale at which a loss trains the velocity, in one forward, from samples that were drawn under
        guidance of ``scale``: that of no guidance where guidance needs a second forward, and the same scale
        where the network takes it as an input."""
        return scale if self.embedded else self.none

    def combined(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """The guided velocity (n, c, h, w), if it needs the empty prompt."""
        return guided(v_cond, v_uncond, scale)


class Embedded(ClassifierFree):
    """The network was distilled from a guided one, and the scale is one of its inputs: one forward."""

    embedded = True
    usual = 3.5  # FLUX.1's, in diffusers' pipeline

    def needs_empty_prompt(self, scale: float) -> bool:
        return False


class Unguided(ClassifierFree):
    """The network was distilled and takes no scale: 1, which is no guidance, is the only one."""

    usual = 1.0

    def problem(self, scale: float) -> str | None:
        return None if scale == 1 else "this model was distilled to need none; give 1"


CLASSIFIER_FREE = ClassifierFree()
EMBEDDED = Embedded()
UNGUIDED = Unguided()
