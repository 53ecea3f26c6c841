"""The interface between the engine and a text-to-image model of rectified flow.

:class:`Model` is the block of a recipe that names weights, :class:`FlowModel` is what it loads. The numeric
conventions of a family (latent scaling, timesteps of 0 to 1000, text encoders) stay inside its class.

To add a model, write these members, in one module of ``posttrain/models`` or of a package with an entry point
in the group ``posttrain.models``:

1. ``Model.type``, the name by which recipes choose it, as ``type: Literal["mine"] = "mine"``
2. :meth:`Model.load`, which reads the weights
3. and 4. the arguments of :class:`FlowModel`: the transformer and the device
5. :meth:`FlowModel.encode_prompts`
6. :meth:`FlowModel.posterior`
7. :meth:`FlowModel.latent_shape`
8. :meth:`FlowModel.decode`
9. :meth:`FlowModel.velocity`

Everything else has a default that works. A pipeline in diffusers' folder format needs less: the base classes
in :mod:`posttrain.models._diffusers` do all but the prompt's encoding and the velocity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from posttrain.errors import ModelError
from posttrain.registry import Named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.flow.sampling_settings import Sampling

DtypeName = Literal["fp32", "bf16", "fp16"]
EncoderName = Literal["prompts", "images"]
"""What an encoder encodes."""


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype that a recipe calls ``name``."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


class Model(Named, ABC):
    """A recipe's ``model`` block."""

    trainable: ClassVar[bool] = True
    """Whether stages can train it. A model that cannot be trained must have a :meth:`sampler` of its own."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """The class names of the diffusers pipelines that this model reads."""

    @abstractmethod
    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        """Read the weights. Raises ModelError where they are missing, gated or do not fit together."""

    def materialise(self, folder: Path) -> Model:
        """The model to load. One that must first be made is made under ``folder``, once."""
        del folder
        return self

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel | None:
        """The architecture with uninitialised or random weights; None where its shape is unknown.

        A plan counts it on torch's meta device, where it takes no memory."""
        del transformer_dtype, device
        return None

    def sampler(self, device: torch.device, settings: Sampling) -> Sampler | None:
        """What draws images as ``settings`` say; None for a model that is loaded and sampled by the engine.
        Raises ModelError as :meth:`load`."""
        del device, settings
        return None

    def described(self) -> dict[str, Any]:
        """What changes the images beside the weights, for a result card."""
        return self.model_dump(mode="json", exclude={"path", "offload"})

    def frozen_dtype(self) -> DtypeName:
        """The precision of a transformer that is not fully trained."""
        return "fp32"

    def missing(self) -> str | None:
        """Why the weights cannot be loaded, as far as can be seen without loading; None if they can."""
        return None

    def divisor(self) -> int | None:
        """The number of pixels that image sides must be multiples of; None where it is unknown before
        loading."""
        return None

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        """Whether an encoder stays in the CPU's memory while it does not work: always, or only once its
        outputs are ``cached``. See :meth:`FlowModel.rest`."""
        del encoder, cached
        return False

    def offloaded(self) -> Model | None:
        """The same model with ``offload: true``; None where its encoders rest already, or cannot."""
        return None

    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Name -> shape of the transformer's parameters, without loading them; None if unknown."""
        import torch

        if (outline := self.outline("fp32", torch.device("meta"))) is None:
            return None
        return {name: tuple(tensor.shape) for name, tensor in outline.transformer.named_parameters()}


class PromptSource(Protocol):
    """Gives the conditions of prompts, for example from a cache."""

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """The same as :meth:`FlowModel.encode_prompts`."""
        ...


class FlowModel(ABC):
    """A loaded model. Algorithms train ``transformer``; everything else is frozen."""

    shift: float = 1.0
    """Of the timestep schedule, for sigma(t); see :func:`posttrain.flow.rectified.shift_sigma`."""
    divisor: int = 1
    """Image sides must be multiples of this many pixels."""
    prompt_cache: PromptSource | None = None
    """Where :func:`posttrain.sampling.sampler.encode` looks before it encodes."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self.transformer = transformer
        """A torch module with the methods of diffusers' ModelMixin, ConfigMixin and PeftAdapterMixin."""
        self.module = transformer
        """What :meth:`velocity` calls: the transformer, or what a parallel strategy wraps around it."""
        self.device = device

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, on the device. It must be the same to the bit whatever is encoded
        beside it."""

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The image encoder's mean and log-variance (n, c, h, w) float32 for ``pixels`` (n, 3, h, w) in
        [-1, 1]. Those of an image must be the same to the bit whatever is encoded beside it."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of an image of that size in pixels."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] of ``latents``."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity, (n, c, h, w) float32, at ``latents`` and ``sigma`` (n,). It calls
        ``self.module``."""

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        """The sampling grid for images of that size: ``steps`` sigmas from 1 downwards, then 0."""
        import torch

        from posttrain.flow.rectified import shift_sigma

        del height, width
        return shift_sigma(torch.linspace(1, 0, steps + 1), self.shift).tolist()

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """The latents (n, c, h, w) float32 that standard normal ``noise`` draws from a posterior, scaled as
        the transformer takes them. Each element is a function of the same element alone."""
        import torch

        return mean + torch.exp(0.5 * logvar) * noise

    def encode_images(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Latents of ``pixels`` (n, 3, h, w) in [-1, 1], drawn from the encoder's posterior by ``noise``."""
        return self.latents(*self.posterior(pixels), noise)

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        """What an encoding depends on beside the prompt or the pixels, as JSON: the encoder's settings, and a
        hash of its weights. Raises ModelError for a model whose encodings cannot be cached."""
        raise ModelError(
            f"{type(self).__name__} does not say what its encodings of {encoder} depend on, so "
            "they cannot be cached: remove 'cache' from the recipe"
        )

    def rest(self, encoder: EncoderName) -> None:
        """Move an encoder, and with that of images the decoder, to the CPU's memory; from here on it is on
        the device only while it works. Models may leave it where it is."""
        del encoder

    def encoder_modules(self, encoder: EncoderName) -> Sequence[Any]:
        """The torch modules of an encoder, with that of images the decoder too."""
        del encoder
        return ()

    def save(self, folder: Path, dtype: DtypeName, weights: Mapping[str, Tensor]) -> None:
        """Write what other tools load, the transformer in ``dtype`` with ``weights`` by parameter name; here
        the transformer alone."""
        from posttrain.weights.transformer import save_component

        save_component(self.transformer, folder, torch_dtype(dtype), weights)

    def save_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter as other tools load it; ``weights`` are its tensors by parameter name."""
        from posttrain.weights.transformer import save_adapter

        save_adapter(self.transformer, folder, weights)

    def load_weights(self, source: Path, merge: bool = True) -> None:
        """Replace the transformer's weights by those of a folder that :meth:`save` wrote, or add an adapter
        that :meth:`save_lora` wrote: merged into the weights, or kept beside them, active. Raises
        ModelError where anything is missing or does not fit."""
        from posttrain.weights.transformer import LORA, load_adapter, load_component

        if (source / LORA).is_file():
            return load_adapter(self.transformer, source / LORA, merge=merge)
        if getattr(self.transformer, "peft_config", None):
            self.transformer.unload_lora()  # the new weights already hold the adapters they were trained on
        return load_component(self.transformer, source)


class Sampler(ABC):
    """Draws images for prompts; an evaluation needs no more of a model."""

    device: torch.device
    divisor: int
    """Image sides must be multiples of this many pixels."""
    source: str
    """Where the weights come from, for the result card."""
    settings: Mapping[str, Any]
    """What a recipe's ``model`` block says beside that."""
    forward_equivalents: int
    """Forwards of the denoiser so far, of one sample each."""

    @abstractmethod
    def images(self, prompts: Sequence[str], indices: Sequence[int], settings: Sampling) -> Tensor:
        """Images (n, 3, h, w) in [0, 1], the ``indices[i]``-th of ``prompts[i]``, each from its own noise."""

    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of the denoiser's weights."""
