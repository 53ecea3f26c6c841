"""Defines the interface between the engine and a rectified-flow text-to-image model.

:class:`Model` is the recipe's ``model`` block, which names the weights. :class:`FlowModel` is the loaded
model. A family's numeric conventions (latent scaling, timesteps of 0 to 1000) stay inside its class.

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
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, ClassifierFree
from posttrain.registry import Named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.flow.sampling_settings import Sampling
    from posttrain.sampler import Sampler
    from posttrain.weights.single_file import SingleFile
    from posttrain.weights.token_counts import TokenCounts
    from posttrain.weights.writing import Entry

DtypeName = Literal["fp32", "bf16", "fp16"]
EncoderName = Literal["prompts", "images"]
"""An encoder, named by what it encodes. The one for images includes the decoder."""


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype of a recipe's ``name`` for it."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


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


class PromptSource(Protocol):
    """A source of prompts' conditions, such as a cache."""

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """The same result as :meth:`FlowModel.encode_prompts`."""
        ...


class FlowModel(ABC):
    """A loaded model. Stages train ``transformer``; everything else is frozen."""

    shift: float = 1.0
    """The shift of sigmas at any size; see :func:`posttrain.flow.rectified.shift_sigma`. A model whose shift
    depends on the size overrides :meth:`sigma`."""
    guidance_rule: ClassifierFree = CLASSIFIER_FREE
    """How a guidance scale acts."""
    divisor: int = 1
    """Image sides must be multiples of this many pixels."""
    forward_dtype: torch.dtype | None = None
    """The precision in which a parallel strategy gathers the transformer's weights for a forward; None if it
    is that of the parameters."""
    prompt_cache: PromptSource | None = None
    """The source that :func:`posttrain.sampling.prompts.encode` uses instead of the text encoders, if set."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self.transformer = transformer
        """A torch module with the methods of diffusers' ModelMixin, ConfigMixin and PeftAdapterMixin."""
        self.module = transformer
        """The module that :meth:`velocity` calls: the transformer, or a parallel strategy's wrapper of it."""
        self.device = device

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, on the device: tensors whose first dimension is that of ``prompts``.

        A prompt's condition must be the same to the bit whatever other prompts are encoded with it."""

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's mean and log-variance (n, c, h, w) float32 of ``pixels`` (n, 3, H, W) in [-1, 1].

        An image's result must be the same to the bit whatever other images are encoded with it."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latents of an image of ``height`` x ``width`` pixels.

        May raise ModelError if the model cannot make an image of that size.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The images (n, 3, H, W) in [0, 1] of ``latents`` (n, c, h, w)."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The velocity (n, c, h, w) float32 that ``self.module`` predicts at ``latents`` (n, c, h, w) and
        ``sigma`` (n,) in [0, 1].

        Latents and conditions are given in float32 or lower: cast them to ``self.forward_dtype`` or, if that
        is None, to the transformer's dtype. Under ``precision: bf16`` its weights are bf16, without autocast.
        """

    def sigma(self, t: Tensor, size: Sequence[int]) -> Tensor:
        """Sigma at uniform times ``t`` in [0, 1], of any shape, for latents of ``size`` (h, w).

        Training draws its sigmas by it, and the sampling grid is the same function of a uniform grid."""
        from posttrain.flow.rectified import shift_sigma

        del size
        return shift_sigma(t, self.shift)

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        """The sampling grid for images of that size in pixels: ``steps`` falling sigmas from 1 on, then 0."""
        import torch

        return self.sigma(torch.linspace(1, 0, steps + 1), self.latent_shape(height, width)[1:]).tolist()

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Latents (n, c, h, w) float32, drawn from a posterior with standard normal ``noise`` and scaled as
        the transformer takes them. Each element depends only on the same element of the arguments."""
        import torch

        return mean + torch.exp(0.5 * logvar) * noise

    def encode_images(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Latents of ``pixels`` (n, 3, H, W) in [-1, 1], drawn from the posterior with ``noise``."""
        return self.latents(*self.posterior(pixels), noise)

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        """What an encoding depends on beside the prompt or the pixels, as JSON values: the encoder's settings
        and a hash of its weights. Raises ModelError if the model's encodings cannot be cached."""
        raise ModelError(
            f"{type(self).__name__} does not say what its encodings of {encoder} depend on, so "
            "they cannot be cached: remove 'cache' from the recipe"
        )

    def rest(self, encoder: EncoderName) -> None:
        """Keep an encoder in the CPU's memory while it does not work. A model may leave it on the device."""
        del encoder

    def encoder_modules(self, encoder: EncoderName) -> Sequence[Any]:
        """The torch modules of an encoder."""
        del encoder
        return ()

    def bytes_at_work(self, encoder: EncoderName) -> int:
        """Bytes of the weights that an encoder which rests has on the device while it works: by default
        all."""
        return sum(p.nbytes for module in self.encoder_modules(encoder) for p in module.parameters())

    def save(self, folder: Path, dtype: DtypeName, weights: Mapping[str, Entry]) -> None:
        """Write the folder that other tools load, by default the transformer alone, in ``dtype``. ``weights``
        are the transformer's, by parameter name. Where they lie in parts over several processes, each becomes
        whole when it is read: read, write and drop one after the other."""
        from posttrain.weights.transformer import save_component

        save_component(self.transformer, folder, torch_dtype(dtype), weights)

    def save_exact(self, folder: Path, weights: Mapping[str, Entry]) -> None:
        """Write the transformer's ``weights``, by parameter name, in float32 for :meth:`load_weights`, where
        :meth:`save` rounds them."""
        self.save(folder, "fp32", weights)

    def save_lora(self, folder: Path, weights: Mapping[str, Entry]) -> None:
        """Write the adapter whose ``weights``, by parameter name, are given, in the format of other tools."""
        from posttrain.weights.transformer import save_adapter

        save_adapter(self.transformer, folder, weights)

    def load_weights(self, source: Path, merge: bool = True) -> None:
        """Load the transformer's weights from a folder that :meth:`save` wrote, or add the adapter that
        :meth:`save_lora` wrote, merged into the weights or, without ``merge``, active beside them. Raises
        ModelError if anything is missing or does not fit."""
        from posttrain.weights.adapter import load_adapter
        from posttrain.weights.transformer import LORA, load_component

        if (source / LORA).is_file():
            return load_adapter(self.transformer, source / LORA, merge=merge)
        if getattr(self.transformer, "peft_config", None):
            self.transformer.unload_lora()  # the new weights already contain the adapters
        return load_component(self.transformer, source)
