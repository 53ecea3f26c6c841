"""Defines the interface of a loaded model, which the engine trains and samples with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, ClassifierFree

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.weights.writing import Entry

DtypeName = Literal["fp32", "bf16", "fp16"]
EncoderName = Literal["prompts", "images"]
"""An encoder, named by what it encodes. The one for images includes the decoder."""


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype of a recipe's ``name`` for it."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


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
        return self.latents(*posterior_of(self, pixels), noise)

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


def conditions_of(model: FlowModel, prompts: Sequence[str]) -> Condition:
    """What ``model`` encodes ``prompts`` to. Raises ModelError unless it has tensors of a row for each."""
    found = model.encode_prompts(prompts)
    if not isinstance(found, dict):
        raise _other(model, "encode_prompts", found, "a dict of tensors")
    for name, tensor in found.items():
        if not _is_tensor(tensor) or tensor.shape[:1] != (len(prompts),):
            raise _other(model, "encode_prompts", tensor, f"a row for each of {len(prompts)} prompts", name)
    return found


def posterior_of(model: FlowModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of ``pixels``. Raises ModelError unless the mean has the shape of the latents."""
    found: Any = model.posterior(pixels)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise _other(model, "posterior", found, "mean and log-variance")
    shape = (len(pixels), *model.latent_shape(*pixels.shape[-2:]))
    if not _is_tensor(found[0]) or tuple(found[0].shape) != shape:
        raise _other(model, "posterior", found[0], f"the shape {shape}, by latent_shape", "the mean")
    return found[0], found[1]


def velocity_of(model: FlowModel, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The velocity at ``latents``. Raises ModelError unless it has their shape: a smaller one would be
    repeated over theirs."""
    found = model.velocity(latents, sigma, condition)
    if not _is_tensor(found) or found.shape != latents.shape:
        raise _other(model, "velocity", found, f"the shape {tuple(latents.shape)} of the latents")
    return found


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _other(model: FlowModel, method: str, found: Any, wanted: str, name: str = "") -> ModelError:
    kind, what = type(model), tuple(found.shape) if _is_tensor(found) else type(found).__name__
    of = f"{name} as " if name else ""
    return ModelError(
        f"{kind.__module__}:{kind.__qualname__}.{method} returned {of}{what}, where {wanted} is expected"
    )
