"""Lists the phases of a stage, and what a device holds in each beside weights, optimizer and roles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from posttrain.cache.latents import IMAGE_ENCODE_BATCH
from posttrain.cache.prompts import PROMPT_ENCODE_BATCH
from posttrain.data.family import Facts
from posttrain.engine.rehearsal import Calls, rehearse
from posttrain.model import EncoderName, Model
from posttrain.planning.counts import Counts, Size
from posttrain.planning.data import known
from posttrain.planning.encoders import in_cache, on_device, text_phase
from posttrain.planning.memory import Phase
from posttrain.policy.activations import share_kept
from posttrain.policy.precision import AUTOCAST
from posttrain.stages.hooks.image_grids import SHOWN

if TYPE_CHECKING:
    import torch

    from posttrain.flow.sampling_settings import Sampling
    from posttrain.planning.profile import Profile
    from posttrain.policy.activations import Checkpointing
    from posttrain.recipe.schema import Recipe, Stage


@dataclass(frozen=True)
class StagePlan:
    """A stage on a number of devices, with a micro-batch; all amounts are those of one device."""

    recipe: Recipe
    stage: Stage
    counts: Counts
    devices: int
    micro_batch: int

    def phases(self) -> Iterator[tuple[str, Phase]]:
        """Each phase with its name, in the order of a step."""
        yield from self._loading()
        yield from self._encoding()
        yield from self._rollout()
        yield from self._training()
        yield from self._image_grids()

    def _loading(self) -> Iterator[tuple[str, Phase]]:
        """Frozen weights are whole before they are packed, layer by layer."""
        if (tune := self.stage.tune).packing is None:
            return
        plain = self.counts.shape(tune.model_copy(update={"base": None})).transformer.frozen
        more = plain - self.counts.shape(tune).transformer.frozen
        yield "loading", Phase(float(more), encoders=on_device(self.recipe, self.counts, {}))

    def _encoding(self) -> Iterator[tuple[str, Phase]]:
        text, images = self.counts.text, self._on_device("images")
        if self.cached["prompts"]:
            distinct = self.data.prompts
            at_once = PROMPT_ENCODE_BATCH if distinct is None else min(PROMPT_ENCODE_BATCH, distinct + 1)
            # the cache is filled before any encoder has left the device
            yield "fill prompts", text_phase(self.recipe, self.counts, {}, text(at_once))
        else:
            yield "text", text_phase(self.recipe, self.counts, self.cached, text(self.prompts))
        if self.cached["images"]:
            activations = self.counts.autoencoder("encode", self.size, IMAGE_ENCODE_BATCH)
            yield "fill latents", Phase(activations, encoders=images)
        elif several := self.stage.data.images_per_sample:
            # the images of a sample are encoded one after the other
            activations = self.counts.autoencoder("encode", self.size, self.batch)
            yield "encoding", Phase(activations, 4.0 * several * self.batch * self.latent, encoders=images)

    def _rollout(self) -> Iterator[tuple[str, Phase]]:
        rows = min(self.micro_batch, self.batch)
        if self.calls.rollout:
            activations = self._forward(self.size).peak(rows * self.calls.rows_without)
            yield "rollout", Phase(activations, self.held, encoders=self._on_device(), forward=True)
        if self.calls.decoded:
            decoding = self.counts.autoencoder("decode", self.size, rows) + self.casts
            yield "decoding", Phase(decoding, self.held, encoders=self._on_device("images"))

    def _training(self) -> Iterator[tuple[str, Phase]]:
        idle, in_step = self._on_device(), items_in_step(self.stage, self.counts, self.devices)
        activations = self._backward(min(self.micro_batch, in_step) * self.calls.rows_with)
        # the last block that is computed again has the gradients of all other blocks beside it
        recomputed = self.stage.train.gradient_checkpointing == "full" and self.lowered is None
        gradients = in_step > self.micro_batch or recomputed
        yield "training", Phase(activations, self.held, gradients, idle, forward=True, backward=True)
        copies = self.casts if self.lowered is None else 2.0 * self.trained
        yield "backward's end", Phase(copies, self.held, gradients=True, encoders=idle)
        yield "optimizer", Phase(0.0, self.held, gradients=True, encoders=idle)

    def _image_grids(self) -> Iterator[tuple[str, Phase]]:
        """Image grids, and the held-out scores of the monitor: both sample as the evaluation does."""
        evaluation, monitor = self.recipe.evaluation, self.stage.monitor
        images = [SHOWN] if self.stage.train.sample_every else []
        if monitor is not None and evaluation is not None:
            images.append(min(evaluation.batch_size, monitor.prompts))
        if not images:
            return
        size = self.size if evaluation is None else square(evaluation)
        branches = 2 if evaluation is None else branches_of(evaluation, self.recipe.model)
        activations = self._forward(size).peak(min(self.micro_batch, max(images)) * branches)
        yield "image grids", Phase(activations, encoders=self._on_device(), forward=True)
        decoding = self.counts.autoencoder("decode", size, max(images))
        yield "grids' decoding", Phase(decoding, encoders=self._on_device("images"))

    def _forward(self, size: Size) -> Profile:
        """What a forward without gradients holds."""
        return self.counts.memory("forward", size, self.stage.tune, self.autocast, lowered=self.lowered)

    def _backward(self, rows: int) -> float:
        """Bytes that a forward and backward of ``rows`` rows holds.

        Compiled blocks keep a share of what they keep without checkpointing, and at least what they keep
        under full checkpointing. What the compiler fuses is counted as if it were not."""

        def held(checkpointing: Checkpointing) -> float:
            tune, lowered = self.stage.tune, self.lowered
            profile = self.counts.memory("training", self.size, tune, self.autocast, checkpointing, lowered)
            return profile.peak(rows)

        train = self.stage.train
        given = train.gradient_checkpointing
        checkpointing: Checkpointing = "off" if given == "auto" else given
        if not train.compile or checkpointing == "off" or checkpointing == "full":
            return held(checkpointing)
        return held("full") + share_kept(checkpointing) * (held("off") - held("full"))

    @cached_property
    def calls(self) -> Calls:
        """How the algorithm calls the model."""
        return calls_of(self.stage, self.counts)

    @cached_property
    def data(self) -> Facts:
        """What is known of the stage's data."""
        return known(self.stage.data, self.counts, self.stage.name)

    @cached_property
    def cached(self) -> dict[EncoderName, bool]:
        """Which encoders' outputs the cache has."""
        return in_cache(self.recipe, self.stage)

    @property
    def size(self) -> Size:
        """The size of the training images in pixels."""
        return self.data.size

    @property
    def lowered(self) -> torch.dtype | None:
        """The precision of the weights in a forward, if it is not that of the optimizer's weights."""
        return AUTOCAST[self.stage.train.precision] if self.recipe.parallel.lowers else None

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision of autocast, if there is one."""
        return None if self.recipe.parallel.lowers else AUTOCAST[self.stage.train.precision]

    @cached_property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(self.counts.shape(self.stage.tune).transformer.trained)

    @property
    def batch(self) -> int:
        """Samples in a batch."""
        return -(-self.stage.train.batch_size // self.devices)

    @property
    def prompts(self) -> int:
        """Encoded prompts of a batch, the empty one included."""
        return self.batch // self.stage.algorithm.samples_per_prompt + 1

    @cached_property
    def latent(self) -> int:
        """Numbers in the latents of one image."""
        return math.prod(self.counts.latent_shape(self.size))

    @cached_property
    def held(self) -> float:
        """Bytes of the batch's conditions and items."""
        conditions = self.counts.condition_bytes() * self.prompts
        per_sample, per_number = self.calls.item_bytes
        items = self.batch * (per_sample + per_number * self.latent)
        several = self.stage.data.images_per_sample
        if self.counts.cuda or self.cached["images"] or not several:
            return conditions + items
        # on the CPU this batch's pixels stay until the next batch, and a copy pads the batch to full size
        return conditions + items + 2 * several * self.batch * 4 * 3 * math.prod(self.size)

    @cached_property
    def casts(self) -> float:
        """Bytes of the low-precision copies that autocast keeps of whole weights (``Policy.casts_kept``)."""
        gathers = self.recipe.parallel.shares(self.devices).gathers
        return 0.0 if self.autocast is None or gathers else 2.0 * self.trained

    def _on_device(self, *working: EncoderName) -> frozenset[EncoderName]:
        return on_device(self.recipe, self.counts, self.cached, *working)


def calls_of(stage: Stage, counts: Counts) -> Calls:
    """How the stage's algorithm calls the model."""
    return counts.once(
        ("calls", stage.algorithm.type, stage.algorithm.model_dump_json()),
        lambda: rehearse(stage.algorithm, counts.model.guidance_rule()),
    )


def items_in_step(stage: Stage, counts: Counts, devices: int) -> int:
    """The items in one optimizer step on one device."""
    batch = -(-stage.train.batch_size // devices)
    return max(int(batch * calls_of(stage, counts).items) // stage.train.steps_per_batch, 1)


def square(sampling: Sampling) -> Size:
    """(height, width) of the sampled images in pixels."""
    return sampling.resolution, sampling.resolution


def branches_of(sampling: Sampling, model: Model) -> int:
    """Forwards in one sampling step: two with classifier-free guidance, else one."""
    return 2 if model.guidance_rule().needs_empty_prompt(sampling.guidance) else 1
