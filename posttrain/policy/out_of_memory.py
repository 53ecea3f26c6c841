"""What happens where memory does not suffice: half as many rows at a time, from there on."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from posttrain.errors import PosttrainError, TrainingError
from posttrain.support.device import free_memory

if TYPE_CHECKING:
    from posttrain.policy.policy import Policy

T = TypeVar("T")
log = logging.getLogger(__name__)
_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "bad_alloc")
"""What MPS, cuBLAS, cuDNN and the CPU's allocators say in a plain RuntimeError."""


class OutOfMemory(TrainingError):
    """Memory did not suffice, and the work cannot be tried again where it stopped."""

    def __init__(self, error: BaseException, before: int, micro_batch: int) -> None:
        super().__init__(f"out of memory with {before} rows at a time ({_in_short(error)})")
        self.micro_batch = micro_batch
        """How many rows at a time to go on with."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is this machine's lack of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        # an error of our own may quote what another machine said
        if isinstance(error, RuntimeError) and not isinstance(error, PosttrainError):
            return any(words in str(error).lower() for words in _WORDS)
        error = error.__cause__
    return False


def too_little(what: str, error: BaseException) -> TrainingError:
    """The error where fewer rows at a time are no help."""
    return TrainingError(
        f"out of memory {what} ({_in_short(error)}). What needs less: gradient_checkpointing, precision "
        "bf16, optimizer adamw8bit, a LoRA, model.offload, sharding, a smaller resolution; 'posttrain plan' "
        "says how much each saves"
    )


@contextlib.contextmanager
def not_repeated(what: str) -> Iterator[None]:
    """Raise TrainingError where memory does not suffice in the block, which must not run a second time."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise too_little(what, error) from error


def fitted(work: Callable[[], T], policy: Policy, undone: Callable[[], bool]) -> T:
    """What ``work`` returns, repeated with half as many rows at a time as long as memory does not suffice.

    ``undone`` is asked then: it undoes what the work left behind, or says that this cannot be. Raises
    OutOfMemory where it cannot, and TrainingError where one row alone does not fit.
    """
    while True:
        policy.largest_forward = 0
        try:
            return work()
        except TrainingError:
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # a micro_batch is often larger than what there was to put into it
            before = min(policy.micro_batch, policy.largest_forward or policy.micro_batch)
            if not (micro_batch := before // 2):
                raise too_little("with one row at a time", error) from error
            if not undone():
                raise OutOfMemory(error, before, micro_batch) from error
            log.warning("out of memory with %d rows at a time; going on with %d", before, micro_batch)
        # only here has the error gone, which holds what did not fit
        gc.collect()
        torch.clear_autocast_cache()
        free_memory(policy.model.device)
        policy.micro_batch = micro_batch


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
