"""Defines the base class of the recipe blocks of trainable diffusers pipelines.

A family in diffusers' folder format is two short classes (see :mod:`posttrain.models.sd3`):

- of :class:`DiffusersModel`: ``type``, ``pipelines``, ``flow`` and the family's own fields
- of :class:`posttrain.models._diffusers_flow.DiffusersFlowModel`: ``encode`` and ``velocity``
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.model import DtypeName, EncoderName, FlowModel, Model, torch_dtype
from posttrain.models._outline import Configs, configs_at, outlined
from posttrain.weights import pipeline_folder
from posttrain.weights.files import header_shapes
from posttrain.weights.hugging_face import explained, quiet

if TYPE_CHECKING:
    from typing import Self

    import torch


class DiffusersModel(Model, ABC):
    """A diffusers pipeline whose ``transformer`` can be trained."""

    flow: ClassVar[Callable[..., FlowModel]]
    """The class of the loaded model."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Components that a folder may lack. diffusers must be told which ones it lacks."""
    buffers: ClassVar[frozenset[str]] = frozenset()
    """Tensors in the transformer's file that are not parameters, so never trained."""
    packing: ClassVar[int] = 1
    """Side of the square of latents that becomes one token before patches are cut (FLUX: 2)."""

    path: str = Field(min_length=1)
    """A diffusers folder, a hub name such as ``stabilityai/stable-diffusion-3.5-medium``, or
    ``posttrain/tiny-sd3``, the small Shapes model that comes with the package."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    dtype: DtypeName = "fp32"
    """Precision of the text encoders, and of a frozen transformer (LoRA). The VAE is always fp32."""
    offload: bool = False
    """Keep the text encoders and the VAE in the CPU's memory and move them to the device only while they
    work. Encoders whose outputs are cached are always moved off the device."""

    def left_out(self) -> frozenset[str]:
        """The components that this block switches off."""
        return frozenset()

    def encoding_settings(self) -> dict[str, Any]:
        """The fields that change a prompt's encoding; the cache's name depends on them. By default, all
        fields of the family's own."""
        own = type(self).model_fields.keys() - DiffusersModel.model_fields.keys()
        return self.model_dump(mode="json", include=set(own))

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        import diffusers

        if (reason := self.missing()) is not None:
            raise ModelError(reason)
        kind: Any = getattr(diffusers, self.pipelines[0])
        dtypes = self._dtypes(transformer_dtype)
        with quiet(), explained(self.path):
            if (source := pipeline_folder.local_folder(self.path)) is None:
                source = Path(kind.download(self.path, revision=self.revision))
            absent = self.left_out() | (self.optional - pipeline_folder.components(source))
            pipeline = kind.from_pretrained(source, torch_dtype=dtypes, **dict.fromkeys(absent))
        return self.flow(self, pipeline, source, device)

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel | None:
        configs = configs_at(self.path)
        return None if configs is None else self.outline_of(configs, transformer_dtype, device)

    def outline_of(
        self, configs: Configs, transformer_dtype: DtypeName, device: torch.device
    ) -> FlowModel | None:
        """As :meth:`outline`, but with the components' configurations given."""
        absent = self.left_out() | self.optional
        kept = {name: config for name, config in configs.items() if name not in self.left_out()}
        with quiet():
            pipeline = outlined(self.pipelines[0], kept, absent, self._dtypes(transformer_dtype), device)
        settled = self.model_copy(update={"offload": False})  # an outline has no weights to offload
        return None if pipeline is None else self.flow(settled, pipeline, Path(self.path), device)

    def frozen_dtype(self) -> DtypeName:
        return self.dtype

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        return self.offload or cached

    def offloaded(self) -> Self | None:
        return None if self.offload else self.model_copy(update={"offload": True})

    def missing(self) -> str | None:
        return pipeline_folder.missing(self.path, "transformer", self.pipelines)

    def divisor(self) -> int | None:
        if (configs := configs_at(self.path)) is None:
            return None
        return self.divisor_of(configs["transformer"], compression(configs["vae"]))

    @classmethod
    def divisor_of(cls, transformer: Any, factor: int) -> int:
        """The number of pixels that image sides must be multiples of. ``transformer`` is its configuration;
        one latent stands for ``factor`` x ``factor`` pixels."""
        return factor * cls.packing * (transformer.get("patch_size") or 1)

    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        if (folder := pipeline_folder.local_folder(self.path)) is None:
            return super().transformer_shapes()
        if (shapes := header_shapes(folder / "transformer")) is None:
            return None
        return {name: shape for name, shape in shapes.items() if name not in self.buffers}

    def _dtypes(self, transformer_dtype: DtypeName) -> dict[str, torch.dtype]:
        names: dict[str, DtypeName] = {"default": self.dtype, "vae": "fp32", "transformer": transformer_dtype}
        return {component: torch_dtype(name) for component, name in names.items()}


def compression(vae: Any) -> int:
    """How many pixels of a side become one latent, from the autoencoder's configuration. Raises ModelError if
    the configuration does not tell."""
    for name, extra in (
        ("encoder_block_out_channels", 1),
        ("block_out_channels", 1),
        ("temperal_downsample", 0),
    ):
        if (levels := vae.get(name)) is not None:
            return 2 ** (len(levels) - extra)
    raise ModelError(f"the autoencoder's configuration has no 'block_out_channels': {sorted(vae)}")
