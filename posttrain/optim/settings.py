"""The ``train`` block of a stage: optimizer, learning rate, batch sizes, precision and intervals."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.policy.activations import Checkpointing
from posttrain.registry import FREE, LATE, Spec, field_error
from posttrain.support.wording import nearest

Auto = Literal["auto"]
OptimizerName = Literal["adamw", "adamw8bit"]


def _count_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r} is not allowed: a whole number of 1 or more, or auto")


def _checkpointing(value: Any) -> Any:
    if value in ("off", "selective", "full", "auto") or (type(value) is float and 0 < value < 1):
        return value
    raise ValueError(
        f"{value!r} is not allowed: off, selective, full, auto, or the share of activations that compiled "
        "blocks keep, a number between 0 and 1"
    )


def _yes_or_auto(value: Any) -> Any:
    if value == "auto" or type(value) is bool:
        return value
    raise ValueError(f"{value!r} is not allowed: true, false or auto")


class Train(Spec):
    """How a stage is optimised."""

    steps: Annotated[int, LATE] = Field(ge=1, le=10**9)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1, le=1_000_000)
    """Samples in one batch, over all processes: images, pairs, or with prompts the images of one rollout."""
    steps_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps on one batch. Each trains on an equal part of it."""
    micro_batch: Annotated[int | Auto, BeforeValidator(_count_or_auto), FREE] = 8
    """Items in one forward-backward, and samples in one forward of a rollout. It bounds memory, and changes
    results by rounding only. Items are samples; for SOAR also auxiliary points; for online algorithms trained
    steps. ``auto`` finds once how many fit on the device. If memory runs out, the run continues with half as
    many."""
    optimizer: OptimizerName = "adamw"
    """``adamw8bit`` keeps the moments in 8 bits, a quarter of the memory. It needs ``single`` or ``ddp``."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """AdamW's learning rate after the warm-up. Default: HY-SOAR's for full tuning. A LoRA takes a larger one,
    such as 1e-4 to 3e-4."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """The learning rate after the warm-up. ``cosine`` and ``linear`` end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decoupled weight decay: a step takes learning_rate * weight_decay of each weight off. Default:
    HY-SOAR's, and torch's."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's decay rates, each in [0, 1), of the running means of the gradient and of its square. Default:
    torch's."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW adds this to the root of the mean squared gradient, by which it divides. Default: torch's."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient's norm is clipped to this."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the EMA, the moving average of weights that is evaluated and exported. None by default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the transformer's forward. With bf16, trained weights and moments stay
    float32, and the forward computes with bf16 copies of the weights (``deepspeed``: with autocast)."""
    gradient_checkpointing: Annotated[
        Checkpointing | Literal["auto"], BeforeValidator(_checkpointing), FREE
    ] = "off"
    """What the backward recomputes to save memory: nothing (``off``), all but matrix products and attention
    (``selective``), or whole blocks (``full``), which costs one more forward. A number between 0 and 1 needs
    ``compile``: the compiler keeps that share of the activations, those that are dear to compute; compiled,
    ``selective`` is 0.5. Results do not change but for the compiler's rounding. ``auto`` takes what is
    fastest on CUDA, found once by trying, and ``off`` elsewhere."""
    compile: Annotated[bool | Auto, BeforeValidator(_yes_or_auto), FREE] = False
    """Compile the transformer's blocks (torch.compile). It pays on CUDA in long runs, because each size of
    image and of micro-batch is compiled once, in about a minute. Results change by rounding only. ``auto``
    compiles on CUDA if the stage would take ten minutes or more and compiled blocks are faster."""
    stop_after_refused: Annotated[int, FREE] = Field(default=3, ge=1)
    """The run stops after this many refused steps in a row. A step is refused, and changes nothing, if its
    loss, its gradient or a reward is not finite."""
    log_every: Annotated[int, FREE] = Field(default=10, ge=1)
    """Steps between records of the metrics. The first and the last step are always recorded."""
    checkpoint_every: Annotated[int, FREE] = Field(default=500, ge=1)
    """Steps between checkpoints, from which an interrupted run goes on. The last step always writes one."""
    checkpoint_minutes: Annotated[float | None, FREE] = Field(default=15.0, ge=0)
    """Minutes after the last checkpoint until the next, whatever the step; 0 or null for none."""
    keep_checkpoints: Annotated[int, FREE] = Field(default=2, ge=1)
    """How many checkpoints of the stage stay on disk: the latest ones."""
    keep_every: Annotated[int | None, FREE] = Field(default=None, ge=1)
    """Checkpoints of steps that are multiples of this stay as well; a multiple of ``checkpoint_every``."""
    keep_best: Annotated[str | None, FREE] = None
    """The name of a score of the evaluation. The checkpoint of the reading of ``monitor`` in which it was
    best stays as well."""
    sample_every: Annotated[int | None, FREE] = Field(default=500, ge=1)
    """Steps between image grids; null for none. The first grid comes before training, the last after it. They
    show the evaluation's first prompts, sampled as the evaluation does, or captions of the data if there is
    no evaluation."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _a_share_is_compiled(self) -> Self:
        if isinstance(self.gradient_checkpointing, float) and self.compile is False:
            share = f"{self.gradient_checkpointing:g}"
            message = f"{share} needs compile: true or auto; without it take off, selective or full"
            raise field_error(("gradient_checkpointing",), message)
        return self

    @model_validator(mode="after")
    def _what_is_kept_is_written(self) -> Self:
        every, kept = self.checkpoint_every, self.keep_every
        if kept is not None and kept % every:
            message = f"{kept} is no multiple of checkpoint_every, {every}; {nearest(kept, every)}"
            raise field_error(("keep_every",), message)
        return self

    @model_validator(mode="after")
    def _batches_are_whole(self) -> Self:
        n = self.steps_per_batch
        if n > self.batch_size:
            raise field_error(("steps_per_batch",), f"{n} is more than the batch_size, {self.batch_size}")
        # to resume from the middle of a batch, a checkpoint would need the batch itself
        for name in ("steps", "checkpoint_every", "sample_every"):
            if (value := getattr(self, name)) is not None and value % n:
                message = f"{value} is no multiple of steps_per_batch, {n}; {nearest(value, n)}"
                raise field_error((name,), message)
        return self
