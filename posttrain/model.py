"""What a text-to-image model must offer so that any algorithm can train it.

:class:`Model` is the block of a recipe that names weights; :class:`FlowModel` is what it loads. Numeric
conventions of a model family (latent scaling, timesteps of 0 to 1000, text encoders) end here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.errors import ModelError
from posttrain.spec import Named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.cache.prompts import PromptCache
    from posttrain.condition import Condition
    from posttrain.sampling_settings import Sampling
    from posttrain.sampling import Sampler

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
    """Whether stages can train it; otherwise :meth:`sampler` is all it offers."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """The names that diffusers gives to the pipelines that this model reads."""

    def materialise(self, folder: Path) -> Model:
        """The model to load; one that must first be made is made under ``folder``, once."""
        del folder
        return self

    @abstractmethod
    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        """Read the weights. Raises ModelError where they are missing, gated or do not fit together."""

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel | None:
        """The model as :meth:`load` gives it, but with weights that are nobody's; None where its shape is
        unknown. Under torch's FakeTensorMode it costs no memory, and counts as the real one."""
        del transformer_dtype, device
        return None

    def sampler(self, device: torch.device, settings: Sampling) -> Sampler:
        """What draws images as ``settings`` say. Raises ModelError as :meth:`load`."""
        from posttrain.sampling import flow_sampler

        source = self.model_dump(mode="json").get("path", self.type)
        return flow_sampler(self.load(device, "fp32"), self, settings, source)

    def described(self) -> dict[str, Any]:
        """What changes the images beside the weights, for a result card."""
        return self.model_dump(mode="json", exclude={"path", "offload"})

    def frozen_dtype(self) -> DtypeName:
        """Of a transformer that is not fully trained."""
        return "fp32"

    @abstractmethod
    def missing(self) -> str | None:
        """Why the weights cannot be loaded, as far as can be seen without loading; None if they can."""

    @abstractmethod
    def divisor(self) -> int | None:
        """What image sides must be multiples of, from the model's configuration; None where not at hand."""

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        """Whether an encoder lies in the CPU's memory, and on another device only while it works: from the
        start, or once what it encodes is ``cached``. See :meth:`FlowModel.rest`."""
        del encoder, cached
        return False

    def offloaded(self) -> Model | None:
        """The same with ``offload: true``, by which its encoders rest from the start; None where they do so
        already, or cannot."""
        return None

    def encoding_bytes(self, encoder: EncoderName, side: int) -> int | None:
        """Bytes of an encoded prompt, or of the posterior of an image of ``side`` pixels squared, as they are
        computed, from the model's configuration; None where it is not at hand."""
        del encoder, side
        return None

    @abstractmethod
    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Name -> shape of the transformer's weights, read from file headers; None where not at hand."""


class FlowModel(ABC):
    """A loaded model. ``transformer`` is what algorithms train; everything else is frozen."""

    transformer: Any
    """A torch module, with the methods that diffusers' models have."""
    module: Any
    """What :meth:`velocity` calls: the transformer, or what a parallel strategy wraps around it."""
    device: torch.device
    shift: float
    """Of the timestep schedule, for sigma(t); see :func:`posttrain.flow.shift_sigma`."""
    divisor: int
    """Image sides must be multiples of this many pixels."""
    prompt_cache: PromptCache | None = None
    """Where :func:`posttrain.sampling.encode` looks before it encodes; set by :mod:`posttrain.cache.fill`."""

    def rest(self, encoder: EncoderName) -> None:
        """Keep an encoder, and with that of images the decoder, in the CPU's memory from here on, and on the
        device only while it works: it will hardly be needed. Models may leave it where it is."""
        del encoder

    def encoder_modules(self, encoder: EncoderName) -> Sequence[Any]:
        """The torch modules of an encoder, with that of images the decoder too."""
        del encoder
        return ()

    @abstractmethod
    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        """The sampling grid for images of that size: ``steps`` sigmas from 1 downwards, then 0."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, on the device: to the bit the same whatever is encoded beside it."""

    def encode_images(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Latents of ``pixels`` (n, 3, h, w) in [-1, 1], drawn from the encoder's posterior by ``noise``."""
        return self.latents(*self.posterior(pixels), noise)

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's mean and log-variance (n, c, h, w) float32 for ``pixels`` (n, 3, h, w) in [-1, 1]:
        those of an image are to the bit the same whatever is encoded beside it."""

    @abstractmethod
    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """The latents (n, c, h, w) float32, scaled as the transformer takes them, that standard normal
        ``noise`` draws from a posterior. A function of each element alone."""

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        """What an encoding is a function of beside the prompt, or the pixels: the encoder's weights by their
        hash, and its settings; as JSON. Raises ModelError for a model whose encodings cannot be kept."""
        raise ModelError(
            f"{type(self).__name__} does not say what its encodings of {encoder} depend on, so "
            "they cannot be cached: remove 'cache' from the recipe"
        )

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of an image of that size in pixels."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] of ``latents``."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity, (n, c, h, w) float32, at ``latents`` and ``sigma`` (n,)."""

    @abstractmethod
    def save(self, folder: Path, dtype: DtypeName, weights: Mapping[str, Tensor]) -> None:
        """Write what other tools load: the whole pipeline, its transformer in ``dtype`` with ``weights``."""

    @abstractmethod
    def save_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter as other tools load it; ``weights`` are its tensors by parameter name."""

    @abstractmethod
    def load_weights(self, source: Path, merge: bool = True) -> None:
        """Replace the transformer's weights by those of a folder that :meth:`save` wrote, or add an adapter
        that :meth:`save_lora` wrote: merged into the weights, or kept beside them, active. Raises
        ModelError where anything is missing or does not fit."""
