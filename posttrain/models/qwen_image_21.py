"""Defines Qwen-Image 2.1: one stream of prompt and image, and latents of 16 x 16 pixels with transparency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import ClassifierFree
from posttrain.models._chat import QWEN
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._fitting import check_settings, check_widths
from posttrain.models.qwen_image import QwenImageFlowModel, check_moments
from posttrain.weights.text_processor import load_text_processor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.models._diffusers_flow import Block

KNOWN = {"patch_size": 1}
"""The transformer's setting that would need other inputs if it was different."""
RGBA = 4
"""Channels of the images that the autoencoder takes and gives."""


class Distilled(ClassifierFree):
    """Classifier-free guidance of a model that is meant to be drawn without (QwenImage21Pipeline's call)."""

    usual = 1.0


class RowPositions:
    """The rotations of each row's tokens (n, tokens, d) complex, where diffusers' blocks expect one row's
    (tokens, d) for all."""

    def __init__(self, rotations: Tensor) -> None:
        self.rotations = rotations

    def unsqueeze(self, dim: int) -> Tensor:
        """The rotations with the heads' axis, which ``apply_rotary_emb_qwen`` asks for at ``dim`` 1 of the
        one row's."""
        del dim
        return self.rotations[:, :, None]


class TargetMask:
    """Which tokens are the image's, for a transformer on torch's meta device: its numbers are read, and its
    tensors must be of that device."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __invert__(self) -> Tensor:
        return ~self.mask

    def view(self, *shape: int) -> Tensor:
        """The mask in ``shape`` on the meta device."""
        return self.mask.view(*shape).to("meta")


class QwenImage21FlowModel(QwenImageFlowModel):
    """A loaded Qwen-Image 2.1 pipeline. Images are drawn as they lie on white."""

    spec: QwenImage21

    def __init__(self, spec: Block, pipeline: Any, source: Path, device: torch.device) -> None:
        super().__init__(spec, pipeline, source, device)
        if device.type == "meta":
            labelled = self.transformer.build_token_metadata

            def metadata(*layout: Any) -> tuple[Tensor, TargetMask]:
                ids, target = labelled(*layout)
                return ids, TargetMask(target)

            self.transformer.build_token_metadata = metadata

    def tokenization(self) -> tuple[Any, str, int]:
        pipeline = self.pipeline  # which drops the system's turn
        return pipeline.processor.tokenizer, pipeline.prompt_template_t2i, pipeline._drop_idx

    def states(self, ids: Tensor) -> Tensor:
        import torch

        encoder = self.pipeline.text_encoder.model.language_model
        # without positions of its own, the encoder would look for several texts in a row
        places = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        unnormed = encoder.norm.register_forward_hook(lambda module, inputs, normed: inputs[0])
        try:
            return encoder(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        finally:
            unnormed.remove()

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.forward_dtype or self.transformer.dtype
        height, width = latents.shape[-2:]
        mask = condition["encoder_hidden_states_mask"]
        longest, squares = mask.shape[1], height * width // 4
        # all rows have the longest prompt's layout; which of its tokens are the image's must be readable
        image = mask.new_zeros(len(mask), longest + squares, device="cpu" if mask.is_meta else mask.device)
        image[:, longest:] = True
        lengths, embed = mask.sum(1), self.transformer.pos_embed

        def own(module: Any, inputs: Any, rotations: Tensor) -> RowPositions:
            # an image comes after its own prompt, not after the padding: its frame is the prompt's length
            frames = module.freqs[0][lengths]
            rows = rotations.repeat(len(lengths), 1, 1)
            rows[:, longest:, : frames.shape[1]] = frames[:, None]
            return RowPositions(rows)

        positions = embed.register_forward_hook(own)
        try:
            tokens = self.module(
                hidden_states=latents.flatten(2).transpose(1, 2).to(dtype),
                timestep=sigma,
                encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, height, width)]] * len(latents),
                img_mask=image,
                return_dict=False,
            )[0]
        finally:
            positions.remove()
        return tokens[:, -height * width :].float().transpose(1, 2).unflatten(2, (height, width))

    def tokens(self, size: Sequence[int]) -> int:
        return size[0] * size[1]

    def encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        return super().encoded(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def decoded(self, latents: Tensor) -> Tensor:
        drawn = super().decoded(latents)
        colours, alpha = drawn.clamp(-1, 1).split((3, 1), dim=1)
        white = 1 + (alpha / 2 + 0.5) * (colours - 1)
        return white + 0 * drawn.sum(1, keepdim=True)  # what is not finite stays so, and is not clamped away

    def check(self) -> None:
        transformer, vae = self.transformer.config, self.vae.config
        check_settings("transformer", transformer, KNOWN, "for Qwen-Image 2.1 it is")
        check_settings("vae", vae, {"in_channels": RGBA, "out_channels": RGBA}, "for RGBA it is")
        check_moments(vae)
        if self.pipeline.config.get("sample_sigmas"):
            raise ModelError(
                "model_index.json: sample_sigmas lists the noise levels of a distilled model (Turbo); "
                "training needs those of any number of steps"
            )
        width = self.pipeline.text_encoder.config.text_config.hidden_size
        check_widths(
            transformer,
            ("vae", "its latent channels are", vae.z_dim, "in_channels"),
            ("vae", "its latent channels are", vae.z_dim, "out_channels"),
            ("text_encoder", "its width is", width, "context_in_dim"),
        )


class QwenImage21(DiffusersModel):
    """A Qwen-Image 2.1 pipeline (QwenLM/Qwen-Image-2.1 on GitHub)."""

    type: Literal["qwen_image_21"] = "qwen_image_21"
    pipelines: ClassVar = ("QwenImage21Pipeline",)
    flow: ClassVar = QwenImage21FlowModel
    packing: ClassVar = 2
    template: ClassVar = QWEN
    latents: ClassVar = 128
    loaders: ClassVar = {"processor": load_text_processor}

    max_sequence_length: int = Field(default=512, ge=1, le=4096)
    """Tokens of a prompt, with 8 around it, in training and evaluation. Shorter prompts are padded to as
    many, which costs time and changes nothing; longer ones are cut."""

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        return Distilled()

    def call_settings(self) -> dict[str, Any]:
        return {}  # the pipeline's call takes prompts of any length
