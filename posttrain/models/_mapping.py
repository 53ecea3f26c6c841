"""Says how a diffusers pipeline calls its transformer, so that one class loads any pipeline.

A :class:`Mapping` covers pipelines whose latents (n, c, h, w) go to the transformer as they are, and whose
prompts are encoded to one length by one call of ``encode_prompt``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from posttrain.registry import Spec


class Mapping(Spec):
    """How a pipeline encodes prompts, and what its transformer takes and gives."""

    prompt: dict[str, int] = Field(min_length=1)
    """Argument of the transformer -> its place, from 0 on, in what ``encode_prompt`` returns for prompts."""
    empty: dict[str, int] = Field(default_factory=dict)
    """The same for the negative prompt ``""``, where it is not encoded as a prompt is. The empty prompt of
    guidance is then this one."""
    encode: dict[str, Any] = Field(default_factory=dict)
    """More arguments of ``encode_prompt``, beside the prompts and ``max_sequence_length``."""
    latents: str = Field(default="hidden_states", min_length=1)
    """The transformer's argument for the latents."""
    timestep: str = Field(default="timestep", min_length=1)
    """The transformer's argument for the time."""
    time: Literal["sigma", "1000 sigma", "1 - sigma", "1000 - 1000 sigma"] = "1000 sigma"
    """What the transformer is given as the time of noise level sigma."""
    velocity: Literal["noise - image", "image - noise"] = "noise - image"
    """What the transformer predicts."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the transformer."""
    grid: Literal["scheduler", "1 / steps"] = "scheduler"
    """The times at which the pipeline samples, before the shift: the scheduler's own, or 1 to 1 / steps."""
    positions: Literal["tokens", "side"] | None = None
    """What ``pos_embed_max_size`` in the transformer's configuration counts: all tokens of the largest square
    image, or those of its side. Default: images of any size can be drawn."""
    guidance: Literal["classifier_free", "norm_kept", "none"] = "classifier_free"
    """How a guidance scale acts. ``norm_kept``: the guided velocity has, in each row of latents, the norm of
    the velocity with the prompt. ``none``: the model takes no scale but 1."""


KNOWN: dict[str, Mapping] = {
    # diffusers/pipelines/aura_flow/pipeline_aura_flow.py
    "AuraFlowPipeline": Mapping(
        prompt={"encoder_hidden_states": 0},
        empty={"encoder_hidden_states": 2},
        time="sigma",
        positions="tokens",
    ),
    # diffusers/pipelines/lumina2/pipeline_lumina2.py, with the defaults of its call
    "Lumina2Pipeline": Mapping(
        prompt={"encoder_hidden_states": 0, "encoder_attention_mask": 1},
        empty={"encoder_hidden_states": 2, "encoder_attention_mask": 3},
        time="1 - sigma",
        velocity="image - noise",
        grid="1 / steps",
        guidance="norm_kept",
    ),
}
"""Class of a pipeline -> its mapping."""
