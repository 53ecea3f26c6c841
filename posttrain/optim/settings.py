"""How is a stage optimised? The ``train`` block of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.policy.activations import Checkpointing
from posttrain.registry import Spec, at
from posttrain.support.wording import multiples_near

OptimizerName = Literal["adamw", "adamw8bit"]


def _count_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r} is not allowed: a whole number of 1 or more, or auto")


class Train(Spec):
    """How a stage is optimised."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Samples in one batch, over all processes: of images, what one optimizer step sees; of prompts, the
    samples that one iteration draws and scores."""
    steps_per_batch: int = Field(1, ge=1)
    """Optimizer steps on one batch, each on an equal part of it."""
    micro_batch: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = 8
    """Items in one forward-backward, and samples in one forward of a rollout: bounds the memory, does not
    change the result but for rounding. Items are samples, for SOAR their auxiliary points too, and for
    online algorithms their trained steps. ``auto`` tries once how many the device has room for. Where they
    do not fit, half as many are taken from there on."""
    optimizer: OptimizerName = "adamw"
    """``adamw8bit`` keeps both moments in 8 bits, a quarter of the memory; under ``single`` and ``ddp``."""
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate after the warm-up; ``cosine`` and ``linear`` end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(1e-2, ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient's norm is clipped to this."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average that is evaluated and exported; none by default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the transformer's forward; bf16 is autocast, with trained weights and optimizer in float32."""
    gradient_checkpointing: Checkpointing = "off"
    """What the backward computes again to save memory: nothing; all but matrix products and attention
    (``selective``); or whole blocks (``full``), which takes a forward more. Changes no number."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile), which pays on CUDA in long runs: each size of image
    and of micro-batch is compiled once, a minute or so. Changes rounding only."""
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int | None = Field(500, ge=1)
    """Steps between image grids, the first before any training and the last after it; null for none. They
    show the first prompts of the evaluation, as it samples them, or else captions of the data."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_are_not_looked_into(self) -> Self:
        if self.compile and self.gradient_checkpointing == "selective":
            words = (
                "selective keeps some results inside a block, which is one piece when compiled: full or off"
            )
            raise at(("gradient_checkpointing",), words)
        return self

    @model_validator(mode="after")
    def _batches_are_whole(self) -> Self:
        n = self.steps_per_batch
        if n > self.batch_size:
            raise at(("steps_per_batch",), f"{n} is more than the batch_size, {self.batch_size}")
        # a checkpoint or an image grid in the middle of a batch would need the batch itself to go on
        for name in ("steps", "checkpoint_every", "sample_every"):
            if (value := getattr(self, name)) is not None and value % n:
                near = multiples_near(value, n)
                words = f"{value} is no multiple of steps_per_batch, {n}; the nearest are {near}"
                raise at((name,), words)
        return self
