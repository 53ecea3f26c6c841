"""Defines the interface between the engine and a rectified-flow text-to-image model.

:class:`Model` is the recipe's ``model`` block, which names the weights. :class:`FlowModel`, of
:mod:`posttrain.flow_model`, is the loaded model. A family's numeric conventions (latent scaling, timesteps of
0 to 1000) stay inside its class.

To add a model, write these members, in one module of ``posttrain/models`` or of a package with an entry point
in the group ``posttrain.models``:

1. ``Model.type``, the name by which recipes choose it, as ``type: Literal["mine"] = "mine"``
2. :meth:`Model.load`, which reads the weights
3. and 4. the two arguments of :class:`FlowModel`: the transformer and the device
5. :meth:`FlowModel.encode_prompts`
6. :meth:`FlowModel.posterior`
7. :meth:`FlowModel.latent_shape`
8. :meth:`FlowModel.decode`
9. :meth:`FlowModel.velocity`

Everything else has a default that works. A pipeline in diffusers' folder format needs only the encoding of
prompts and the velocity, beside the base classes in :mod:`posttrain.models._diffusers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, ClassifierFree
from posttrain.flow_model import DtypeName, EncoderName, FlowModel, PromptSource, torch_dtype
from posttrain.registry import Named

if TYPE_CHECKING:
    import torch

    from posttrain.flow.sampling_settings import Sampling
    from posttrain.sampler import Sampler
    from posttrain.weights.single_file import SingleFile
    from posttrain.weights.token_counts import TokenCounts

__all__ = ["DtypeName", "EncoderName", "FlowModel", "Model", "PromptSource", "torch_dtype"]


def loaded(spec: Model, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
    """What ``spec`` loads. Raises ModelError if that is no FlowModel, and as :meth:`Model.load` does."""
    model = spec.load(device, transformer_dtype)
    if not isinstance(model, FlowModel):
        of, found = type(spec), type(model).__name__
        raise ModelError(f"{of.__module__}:{of.__qualname__}.load returned {found}, which is no FlowModel")
    return model


def loaded_if_fit(spec: Model, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
    """As :func:`loaded`. Raises ModelError also for what :meth:`Model.unfit` says, before weights are read:
    that takes seconds, reading them minutes."""
    if (reason := spec.unfit()) is not None:
        raise ModelError(reason)
    return loaded(spec, device, transformer_dtype)


class Model(Named, ABC):
    """A recipe's ``model`` block."""

    trainable: ClassVar[bool] = True
    """Whether stages can train it. If not, it must return its own :meth:`sampler`."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """The class names of the diffusers pipelines that this model can load."""
    in_comfyui: ClassVar[bool] = True
    """Whether ComfyUI itself draws with models of this family."""

    @abstractmethod
    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        """Load the weights. Raises ModelError if they are missing, gated or do not fit together."""

    def build(self, folder: Path, device: torch.device) -> Model:
        """The model to load. A model that has to be built first is built once, inside ``folder``; if that
        takes training, on ``device``."""
        del folder, device
        return self

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel | None:
        """The architecture with uninitialised or random weights; None if its shape is unknown.

        A plan counts it on torch's meta device, where it takes no memory."""
        del transformer_dtype, device
        return None

    def sampler(self, device: torch.device, settings: Sampling) -> Sampler | None:
        """The model's own sampler for ``settings``; None if the engine loads and samples the model. Raises
        ModelError as :meth:`load` does."""
        del device, settings
        return None

    def card_settings(self) -> dict[str, Any]:
        """The settings that change the images, beside the weights, for a result card."""
        return self.model_dump(mode="json", exclude={"path", "offload"})

    def call_settings(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, beside prompts, size, steps and guidance, that draw as this
        block does."""
        longest = self.model_dump().get("max_sequence_length")  # most families have such a field
        return {} if longest is None else {"max_sequence_length": longest}

    def frozen_dtype(self) -> DtypeName:
        """The precision of a transformer whose weights are frozen (LoRA)."""
        return "fp32"

    def export_dtype(self) -> DtypeName:
        """The precision of what a stage writes for other tools, where its recipe does not name one."""
        return "fp32"

    def missing(self) -> str | None:
        """Why the weights cannot be loaded, as far as can be told without loading them; None if they can."""
        return None

    def unfit(self) -> str | None:
        """Why the components, or the fields of this block, do not fit together, as far as the components'
        configurations tell; None if they do. Takes seconds, and loads no weights."""
        return None

    def field_problems(self) -> Mapping[str, str]:
        """Name of a field -> why its value does not fit the weights, as far as can be told without loading
        them."""
        return {}

    def weight_files(self) -> Mapping[str, Path]:
        """Name, such as ``vae/config.json``, -> each file here that :meth:`load` reads."""
        return {}

    def origin(self) -> dict[str, Any]:
        """The entries ``base_model``, ``license`` and so on, as far as they are known, for the model card of
        what is trained from this model."""
        return {}

    def single_file(self) -> SingleFile | None:
        """How the model's authors lay out its weights in one file, which ComfyUI loads; None if unknown."""
        return None

    def sides(self) -> tuple[int, int | None] | None:
        """What image sides must be multiples of, and the longest (None: any), in pixels; None if unknown."""
        return None

    def native_side(self) -> int | None:
        """The side in pixels of the square images that the model is made for; None if unknown."""
        return None

    def guidance_rule(self) -> ClassifierFree:
        """How a guidance scale acts, as far as can be told without loading the weights."""
        return CLASSIFIER_FREE

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        """Whether an encoder stays in the CPU's memory while it does not work, given whether its outputs are
        ``cached``. See :meth:`FlowModel.rest`."""
        del encoder, cached
        return False

    def offloaded(self) -> Model | None:
        """The same model with ``offload: true``; None if its encoders are offloaded already or cannot be."""
        return None

    def token_counts(self, captions: Sequence[str]) -> Mapping[str, TokenCounts]:
        """Name of a tokenizer -> how many tokens each caption has, as far as its files are here."""
        del captions
        return {}

    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Name -> shape of the transformer's parameters, without loading them; None if unknown."""
        import torch

        if (outline := self.outline("fp32", torch.device("meta"))) is None:
            return None
        return {name: tuple(tensor.shape) for name, tensor in outline.transformer.named_parameters()}
