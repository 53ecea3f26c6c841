"""Defines the base class of the recipe blocks of trainable diffusers pipelines.

A family in diffusers' folder format is two short classes (see :mod:`posttrain.models.sd3`):

- of :class:`DiffusersModel`: ``type``, ``pipelines``, ``flow`` and the family's own fields
- of :class:`posttrain.models._diffusers_flow.DiffusersFlowModel`: ``encode`` and ``velocity``
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, ClassifierFree
from posttrain.model import DtypeName, EncoderName, FlowModel, Model, torch_dtype
from posttrain.models._fitting import check_components
from posttrain.models._licences import origin_of
from posttrain.models._outline import Configs, configs_at, outlined
from posttrain.registry import FREE
from posttrain.weights import pipeline_folder
from posttrain.weights.files import header_shapes, headers
from posttrain.weights.hugging_face import explained, quiet
from posttrain.weights.network import check_headers
from posttrain.weights.pipeline import load_pipeline
from posttrain.weights.token_counts import TokenCounts, token_counts

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
    unread: ClassVar[frozenset[str]] = frozenset()
    """Settings of published transformers that their class does not know, and does not need."""
    unencoded: ClassVar[frozenset[str]] = frozenset()
    """Fields of the family's own that change no prompt's encoding."""
    loaders: ClassVar[Mapping[str, Callable[[Path], Any]]] = {}
    """Component -> what loads it from its folder, if that is not the class in the pipeline's index."""
    packing: ClassVar[int] = 1
    """Side of the square of latents that becomes one token before patches are cut (FLUX: 2)."""
    template: ClassVar[str] = "{}"
    """What a prompt is written into before it becomes tokens, for counting them without the text encoder."""
    latents: ClassVar[int | None] = None
    """The side in latents of the images that the pipeline draws by default, if only its code says it."""

    path: str = Field(min_length=1)
    """A diffusers folder, a hub name such as ``stabilityai/stable-diffusion-3.5-medium``, or
    ``posttrain/tiny-sd3``, the small Shapes model that comes with the package."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    dtype: DtypeName = "fp32"
    """Precision of the text encoders, and of a frozen transformer (LoRA). The VAE is always fp32."""
    offload: Annotated[bool, FREE] = False
    """Keep the text encoders and the VAE in the CPU's memory and move them to the device only while they
    work. Encoders whose outputs are cached are always moved off the device."""

    def kind(self) -> str:
        """The class of the pipeline in diffusers."""
        return self.pipelines[0]

    def left_out(self) -> frozenset[str]:
        """The components that this block switches off."""
        return frozenset()

    def encoding_settings(self) -> dict[str, Any]:
        """The fields that change a prompt's encoding; the cache's name depends on them. By default, all
        fields of the family's own but those in ``unencoded``."""
        own = type(self).model_fields.keys() - DiffusersModel.model_fields.keys() - self.unencoded
        return self.model_dump(mode="json", include=set(own))

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        import diffusers

        if (reason := self.missing()) is not None:
            raise ModelError(reason)
        if self.kind() not in dir(diffusers):
            raise ModelError(f"diffusers {diffusers.__version__} has no {self.kind()}: install a newer one")
        kind: Any = getattr(diffusers, self.kind())
        dtypes = self._dtypes(transformer_dtype)
        with quiet(), explained(self.path):
            if (source := pipeline_folder.complete_folder(self.path, self.left_out(), self.revision)) is None:
                source = Path(kind.download(self.path, revision=self.revision))
        check_components(self, kind, source)
        absent = self.left_out() | (self.optional - pipeline_folder.components(source))
        return self.flow(self, load_pipeline(kind, source, dtypes, absent, self.loaders), source, device)

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> FlowModel | None:
        configs = configs_at(self.path, self.revision)
        return None if configs is None else self.outline_of(configs, transformer_dtype, device)

    def outline_of(
        self, configs: Configs, transformer_dtype: DtypeName, device: torch.device
    ) -> FlowModel | None:
        """As :meth:`outline`, but with the components' configurations given."""
        absent = self.left_out() | self.optional
        kept = {name: config for name, config in configs.items() if name not in self.left_out()}
        with quiet():
            pipeline = outlined(self.kind(), kept, absent, self._dtypes(transformer_dtype), device)
        settled = self.model_copy(update={"offload": False})  # an outline has no weights to offload
        return None if pipeline is None else self.flow(settled, pipeline, Path(self.path), device)

    def unfit(self) -> str | None:
        import diffusers
        import torch

        try:
            with explained(self.path):
                folder = pipeline_folder.complete_folder(self.path, self.left_out(), self.revision)
                if folder is not None and (kind := getattr(diffusers, self.kind(), None)) is not None:
                    check_components(self, kind, folder)
                outline = self.outline("fp32", torch.device("meta"))
                if folder is not None and outline is not None:
                    for name in ("transformer", "vae"):
                        check_headers(getattr(outline, name), folder / name)
        except ModelError as error:
            return str(error)
        return None

    def field_problems(self) -> Mapping[str, str]:
        return pipeline_folder.useless_revision(self.path, self.revision)

    def frozen_dtype(self) -> DtypeName:
        return self.dtype

    def origin(self) -> dict[str, Any]:
        return origin_of(self.path)

    def export_dtype(self) -> DtypeName:
        """bf16 where the base's transformer is published in bf16, else fp32, which rounds nothing."""
        if (folder := pipeline_folder.local_folder(self.path, self.revision)) is None:
            return "fp32"
        weights = headers(folder / "transformer")
        kinds = {kind for name, (kind, _) in weights.items() if name not in self.buffers}
        return "bf16" if kinds == {"BF16"} else "fp32"

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        return self.offload or cached

    def offloaded(self) -> Self | None:
        return None if self.offload else self.model_copy(update={"offload": True})

    def missing(self) -> str | None:
        return pipeline_folder.missing(
            self.path, "transformer", self.pipelines, self.left_out(), self.revision
        )

    def weight_files(self) -> Mapping[str, Path]:
        return pipeline_folder.files_of(self.path, self.left_out(), self.revision)

    def sides(self) -> tuple[int, int | None] | None:
        if (configs := configs_at(self.path, self.revision)) is None:
            return None
        transformer, factor = configs["transformer"], compression(configs["vae"])
        return self.divisor_of(transformer, factor), self.longest_side(transformer, factor)

    def native_side(self) -> int | None:
        return native_side(configs_at(self.path, self.revision) or {}, "transformer", self.latents)

    @classmethod
    def divisor_of(cls, transformer: Any, factor: int) -> int:
        """The number of pixels that image sides must be multiples of. ``transformer`` is its configuration;
        one latent stands for ``factor`` x ``factor`` pixels."""
        return factor * cls.packing * (transformer.get("patch_size") or 1)

    def longest_side(self, transformer: Any, factor: int) -> int | None:
        """The longest side of an image in pixels; None if any will do. For the arguments see
        :meth:`divisor_of`."""
        if (positions := transformer.get("pos_embed_max_size")) is None:
            return None
        return positions * self.divisor_of(transformer, factor)

    def guidance_rule(self) -> ClassifierFree:
        return self.guidance_rule_of((configs_at(self.path, self.revision) or {}).get("transformer", {}))

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        """How a guidance scale acts on a transformer of this configuration."""
        del transformer
        return CLASSIFIER_FREE

    def token_counts(self, captions: Sequence[str]) -> Mapping[str, TokenCounts]:
        if (folder := pipeline_folder.local_folder(self.path, self.revision)) is None:
            return {}
        longest = getattr(self, "max_sequence_length", None)  # most families have such a field
        texts = [self.template.format(caption) for caption in captions]
        return token_counts(folder, texts, self.left_out(), longest)

    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        if (folder := pipeline_folder.local_folder(self.path, self.revision)) is None:
            return super().transformer_shapes()
        if (shapes := header_shapes(folder / "transformer")) is None:
            return None
        return {name: shape for name, shape in shapes.items() if name not in self.buffers}

    def _dtypes(self, transformer_dtype: DtypeName) -> dict[str, torch.dtype]:
        names: dict[str, DtypeName] = {"default": self.dtype, "vae": "fp32", "transformer": transformer_dtype}
        return {component: torch_dtype(name) for component, name in names.items()}


def native_side(configs: Configs, denoiser: str, latents: int | None = None) -> int | None:
    """The side in pixels of the images that a pipeline with these ``configs`` is made for; None if they do
    not tell. ``denoiser`` is the component whose ``sample_size`` counts latents, by default ``latents``."""
    vae = configs.get("vae", {})
    if isinstance(latents := configs.get(denoiser, {}).get("sample_size") or latents, int) and vae:
        return latents * compression(vae)
    return side if isinstance(side := vae.get("sample_size"), int) else None


def compression(vae: Any) -> int:
    """How many pixels of a side become one latent, from the autoencoder's configuration. Raises ModelError if
    the configuration does not tell."""
    for name, extra in (
        ("encoder_block_out_channels", 1),
        ("block_out_channels", 1),
        ("temperal_downsample", 0),
    ):
        if isinstance(levels := vae.get(name), list | tuple):
            return 2 ** (len(levels) - extra)
    raise ModelError(f"the autoencoder's configuration has no 'block_out_channels': {sorted(vae)}")
