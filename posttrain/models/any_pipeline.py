"""Defines the model of any diffusers pipeline that a short mapping describes."""

from __future__ import annotations

import inspect
import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, UNGUIDED, ClassifierFree
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_output, check_widths
from posttrain.models._mapping import KNOWN, Mapping
from posttrain.weights import pipeline_folder

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.model import DtypeName, FlowModel
    from posttrain.models._outline import Configs


class NormKept(ClassifierFree):
    """Classifier-free guidance whose velocity is scaled, in each row of latents, to the norm of the velocity
    with the prompt (``cfg_normalization`` of diffusers' Lumina2Pipeline)."""

    def combined(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        velocity = super().combined(v_cond, v_uncond, scale)
        # where guidance cancels a velocity, there is no direction to scale
        norm = velocity.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return velocity * (v_cond.norm(dim=-1, keepdim=True) / norm)


RULES = {"classifier_free": CLASSIFIER_FREE, "norm_kept": NormKept(), "none": UNGUIDED}
"""Guidance of a mapping -> its rule."""


def readable(mask: Tensor) -> Tensor:
    """``mask``; one without values, on torch's meta device, with the sums of one of the longest prompts,
    because transformers read their lengths."""
    import torch

    if not mask.is_meta:
        return mask
    mask = mask.view_as(mask)
    mask.sum = torch.ones(mask.shape, dtype=mask.dtype, device="cpu").sum  # type: ignore[method-assign]
    return mask


def _unmasked(module: Any, inputs: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inputs of a text encoder without a mask."""
    del module
    return inputs, {name: value for name, value in given.items() if name != "attention_mask"}


class AnyFlowModel(DiffusersFlowModel):
    """A loaded pipeline that a mapping describes."""

    spec: AnyPipeline
    shapes: dict[str, tuple[int, ...]] | None = None
    """The shape of a prompt's condition, once one is known."""

    def __init__(self, spec: AnyPipeline, pipeline: Any, source: Path, device: torch.device) -> None:
        super().__init__(spec, pipeline, source, device)
        self.gives_times = self.mapping.grid == "1 / steps"

    @cached_property
    def mapping(self) -> Mapping:
        """How the pipeline calls its transformer."""
        return self.spec.described()

    def encode(self, prompts: list[str]) -> Condition:
        import torch

        mapping, takes = self.mapping, inspect.signature(self.pipeline.encode_prompt).parameters
        arguments: dict[str, Any] = {"device": self.device, **mapping.encode}
        if (longest := self.spec.max_sequence_length) is not None:
            arguments["max_sequence_length"] = longest
        if "do_classifier_free_guidance" in takes:
            arguments["do_classifier_free_guidance"] = bool(mapping.empty)
        if unknown := sorted(arguments.keys() - takes.keys() - {"device"}):
            raise ModelError(
                f"encode_prompt of {self.spec.kind()} takes no {', '.join(unknown)}; it takes "
                f"{', '.join(takes)}"
            )
        # One more row is empty: without padding in any row, libraries choose other kernels.
        rows = [*prompts, ""]
        found = self.pipeline.encode_prompt(rows, **arguments)
        found = found if isinstance(found, tuple) else (found,)
        condition = {name: self._given(found, name, place) for name, place in mapping.prompt.items()}
        plain = torch.tensor([not prompt for prompt in rows], device=self.device)
        for name, place in mapping.empty.items():
            empty = self._given(found, name, place)
            chosen = plain.reshape(-1, *[1] * (empty.ndim - 1))
            condition[name] = torch.where(chosen, empty, condition[name])
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in condition.items()}
        self.shapes = self.shapes or shapes
        if shapes != self.shapes or any(len(tensor) != len(rows) for tensor in condition.values()):
            raise ModelError(
                f"encode_prompt of {self.spec.kind()} gives prompts other lengths in other calls: {shapes}, "
                f"before {self.shapes}; a mapping needs one length (mapping.encode, max_sequence_length)"
            )
        return {name: tensor[:-1] for name, tensor in condition.items()}

    def _given(self, found: tuple[Any, ...], name: str, place: int) -> Tensor:
        """What ``encode_prompt`` returned at ``place``."""
        import torch

        if place < len(found) and isinstance(found[place], torch.Tensor):
            return found[place]
        kinds = [type(value).__name__ for value in found]
        raise ModelError(
            f"model.mapping: {name} is {place}, but encode_prompt of {self.spec.kind()} returns {kinds}"
        )

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        mapping, dtype = self.mapping, self.forward_dtype or self.transformer.dtype
        time = 1 - sigma if mapping.time in ("1 - sigma", "1000 - 1000 sigma") else sigma
        time = 1000 * time if mapping.time.startswith("1000") else time
        predicted = self.module(
            **{mapping.latents: latents.to(dtype), mapping.timestep: time},
            **{
                name: tensor.to(dtype) if tensor.is_floating_point() else readable(tensor)
                for name, tensor in condition.items()
            },
            **mapping.arguments,
            return_dict=False,
        )[0].float()
        return predicted if mapping.velocity == "noise - image" else -predicted

    def check(self) -> None:
        mapping, takes = self.mapping, inspect.signature(self.transformer.forward).parameters
        given = [mapping.latents, mapping.timestep, *mapping.prompt, "return_dict"]
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ModelError(f"model.mapping: {', '.join(twice)} is named more than once")
        if twice := sorted({*given} & {*mapping.arguments}):
            raise ModelError(f"model.mapping.arguments: posttrain itself gives {', '.join(twice)}")
        named = {*given[:-1], *mapping.arguments}
        if unknown := sorted(named - takes.keys()):
            raise ModelError(
                f"model.mapping: {type(self.transformer).__name__} takes no {', '.join(unknown)}; it takes "
                f"{', '.join(takes)}"
            )
        needed = {n for n, p in takes.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD}
        if lacking := sorted(needed - named):
            raise ModelError(
                f"model.mapping gives no {', '.join(lacking)}, which {type(self.transformer).__name__} needs"
            )
        if self.scheduler.config.get("use_dynamic_shifting"):
            raise ModelError(
                "scheduler/scheduler_config.json: use_dynamic_shifting is true; a model of type diffusers "
                "has one shift for images of all sizes"
            )
        channels = self.vae.config.latent_channels
        check_widths(self.transformer.config, ("vae", "its latent channels are", channels, "in_channels"))
        check_output(self.transformer.config)


class AnyPipeline(DiffusersModel):
    """Any pipeline of diffusers that a :class:`Mapping` describes."""

    type: Literal["diffusers"] = "diffusers"
    pipelines: ClassVar = tuple(KNOWN)
    flow: ClassVar = AnyFlowModel

    pipeline: str | None = Field(default=None, pattern=r"^\w+Pipeline$", examples=["AuraFlowPipeline"])
    """The pipeline's class in diffusers. Default: the one that the folder's index names."""
    mapping: Mapping | None = None
    """How that pipeline calls its transformer. Default: what is known of its class."""
    max_sequence_length: int | None = Field(default=None, ge=1)
    """Tokens of a prompt, if ``encode_prompt`` takes such a number. Default: the pipeline's own."""

    def kind(self) -> str:
        """The class of the pipeline in diffusers."""
        named = self.pipeline or (pipeline_folder.index_of(self.path) or {}).get("_class_name")
        return named if isinstance(named, str) else self.pipelines[0]

    def described(self) -> Mapping:
        """The mapping. Raises ModelError if none is given and none is known."""
        if self.mapping is not None:
            return self.mapping
        if (known := KNOWN.get(self.kind())) is None:
            raise ModelError(
                f"no mapping is known for {self.kind()}, but for {', '.join(KNOWN)}: give model.mapping"
            )
        return known

    def missing(self) -> str | None:
        try:
            self.described()
        except ModelError as error:
            return str(error)
        return pipeline_folder.missing(
            self.path, "transformer", (self.kind(),), self.left_out(), self.revision
        )

    def encoding_settings(self) -> dict[str, Any]:
        mapping = self.described().model_dump(mode="json", include={"prompt", "empty", "encode"})
        return {"pipeline": self.kind(), "max_sequence_length": self.max_sequence_length, **mapping}

    def outline_of(
        self, configs: Configs, transformer_dtype: DtypeName, device: torch.device
    ) -> FlowModel | None:
        import torch

        made = super().outline_of(configs, transformer_dtype, device)
        if made is None or device.type != "meta":
            return made
        for encoder in made.encoder_modules("prompts"):  # transformers looks for padding in masks
            encoder.register_forward_pre_hook(_unmasked, with_kwargs=True)
        try:
            latents = torch.empty(1, *made.latent_shape(*[4 * made.divisor] * 2), device=device)
            with torch.no_grad():
                made.velocity(latents, latents.new_empty(1), made.encode_prompts(["a"]))
        except ModelError:
            raise
        except Exception:  # encode_prompt or a transformer looks into tensors, which have no values there
            return None
        return made

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        return RULES[self.described().guidance]

    def longest_side(self, transformer: Any, factor: int) -> int | None:
        counted = self.described().positions
        if counted is None or (most := transformer.get("pos_embed_max_size")) is None:
            return None
        return (math.isqrt(most) if counted == "tokens" else most) * self.divisor_of(transformer, factor)
