"""Recipe blocks of diffusers pipelines that can be trained: what all families share.

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
    """What the family loads."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Components that a folder may lack. diffusers wants to be told of each."""
    packing: ClassVar[int] = 1
    """Latents whose sides the transformer packs into one token before it cuts patches (FLUX: 2)."""

    path: str = Field(min_length=1)
    """A diffusers folder, a hub name such as ``stabilityai/stable-diffusion-3.5-medium``, or
    ``posttrain/tiny-sd3``, the small model of the Shapes world that comes with the package."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: DtypeName = "fp32"
    """Of the text encoders, and of the transformer where it is frozen (LoRA). The VAE is always fp32."""
    offload: bool = False
    """Keep the text encoders and the VAE in the CPU's memory, and on the device only while they work.
    Encoders whose outputs are cached leave the device in any case."""

    def left_out(self) -> frozenset[str]:
        """Components that this block says not to load."""
        return frozenset()

    def encoding_settings(self) -> dict[str, Any]:
        """The fields that change a prompt's encoding, for the name of its cache; all of the family's own by
        default."""
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
        """As :meth:`outline`, for components of other configurations than those at ``path``."""
        absent = self.left_out() | self.optional
        kept = {name: config for name, config in configs.items() if name not in self.left_out()}
        with quiet():
            pipeline = outlined(self.pipelines[0], kept, absent, self._dtypes(transformer_dtype), device)
        settled = self.model_copy(update={"offload": False})  # there is nothing to keep elsewhere
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
        """The pixels that image sides must be multiples of, for the configuration of a transformer and the
        autoencoder's compression of a side."""
        return factor * cls.packing * (transformer.get("patch_size") or 1)

    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        if (folder := pipeline_folder.local_folder(self.path)) is None:
            return super().transformer_shapes()
        return header_shapes(folder / "transformer")

    def _dtypes(self, transformer_dtype: DtypeName) -> dict[str, torch.dtype]:
        names: dict[str, DtypeName] = {"default": self.dtype, "vae": "fp32", "transformer": transformer_dtype}
        return {component: torch_dtype(name) for component, name in names.items()}


def compression(vae: Any) -> int:
    """How many pixels of a side become one latent, from the autoencoder's configuration. Raises ModelError
    for one that says nothing of it."""
    for name, extra in (
        ("encoder_block_out_channels", 1),
        ("block_out_channels", 1),
        ("temperal_downsample", 0),
    ):
        if (levels := vae.get(name)) is not None:
            return 2 ** (len(levels) - extra)
    raise ModelError(f"the autoencoder's configuration has no 'block_out_channels': {sorted(vae)}")
