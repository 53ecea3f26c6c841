"""Recognises lack of memory, and repeats the work with half as many rows at a time."""

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
_PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "bad_alloc")
"""What MPS, cuBLAS, cuDNN and the CPU's allocators say in a plain RuntimeError."""


class OutOfMemory(TrainingError):
    """Memory did not suffice, and the work cannot be repeated from where it stopped."""

    def __init__(self, error: BaseException, before: int, micro_batch: int) -> None:
        super().__init__(f"out of memory with {before} rows at a time ({_in_short(error)})")
        self.micro_batch = micro_batch
        """The number of rows at a time to continue the run with."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or its cause, is a lack of memory on this machine."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        # the message of a PosttrainError may quote another machine
        if isinstance(error, RuntimeError) and not isinstance(error, PosttrainError):
            return any(phrase in str(error).lower() for phrase in _PHRASES)
        error = error.__cause__
    return False


def too_little(what: str, error: BaseException) -> TrainingError:
    """The error to raise if memory does not suffice and fewer rows at a time would not help."""
    return TrainingError(
        f"out of memory {what} ({_in_short(error)}). What needs less: gradient_checkpointing, precision "
        "bf16, optimizer adamw8bit, a LoRA, model.offload, sharding, a smaller resolution; 'posttrain plan' "
        "says how much each saves"
    )


@contextlib.contextmanager
def not_repeated(what: str) -> Iterator[None]:
    """Raise TrainingError if memory does not suffice in the block, which must not run a second time."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise too_little(what, error) from error


def halve_until_it_fits(work: Callable[[], T], policy: Policy, undo: Callable[[], bool]) -> T:
    """Return what ``work`` returns; halve ``policy.micro_batch`` and repeat it while memory does not suffice.

    After a failure ``undo`` removes what the work left behind, and returns whether the work can be repeated.
    Raises OutOfMemory if it cannot, and TrainingError if one row alone does not fit.
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
            # the forwards may have had fewer rows than micro_batch allows
            before = min(policy.micro_batch, policy.largest_forward or policy.micro_batch)
            if not (micro_batch := before // 2):
                raise too_little("with one row at a time", error) from error
            if not undo():
                raise OutOfMemory(error, before, micro_batch) from error
            log.warning("out of memory with %d rows at a time; continuing with %d", before, micro_batch)
        # outside of the except block, because the error keeps the failed work's tensors alive
        gc.collect()
        torch.clear_autocast_cache()
        free_memory(policy.model.device)
        policy.micro_batch = micro_batch


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
