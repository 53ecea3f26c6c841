"""What happens where memory does not suffice: half as many rows at a time, from there on."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from posttrain.device import free_memory
from posttrain.errors import TrainingError

if TYPE_CHECKING:
    from posttrain.policy import Policy

T = TypeVar("T")
log = logging.getLogger(__name__)
_WORDS = ("out of memory", "can't allocate memory")
"""What MPS and the CPU's allocator say in a plain RuntimeError."""


class OutOfMemory(TrainingError):
    """Memory did not suffice, and the work cannot be tried again where it stopped."""

    def __init__(self, words: str, chunk: int) -> None:
        super().__init__(words)
        self.chunk = chunk
        """How many rows at a time to go on with."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is a device's or the machine's lack of memory."""
    while error is not None:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in said for words in _WORDS):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def not_repeated(policy: Policy) -> Iterator[None]:
    """Raise OutOfMemory where memory does not suffice in the block, which must not run a second time."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        words = f"out of memory in the optimizer's step ({_in_short(error)})"
        raise OutOfMemory(words, max(policy.chunk // 2, 1)) from error


def fitted(work: Callable[[], T], policy: Policy, may_repeat: Callable[[], bool]) -> T:
    """What ``work`` returns, repeated with half of ``policy.chunk`` as long as memory does not suffice.

    ``may_repeat`` is asked then: it undoes what the work left behind, or says that this cannot be. Raises
    OutOfMemory where it cannot, and TrainingError where one row alone does not fit.
    """
    while True:
        try:
            return work()
        except OutOfMemory:
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            chunk, reason = policy.chunk // 2, _in_short(error)
            if not chunk:
                raise TrainingError(
                    f"out of memory with one row at a time ({reason}). What needs less: "
                    "gradient_checkpointing, precision bf16, a LoRA, model.offload, sharding, a smaller "
                    "resolution; 'posttrain plan' says how much each saves"
                ) from error
            if not may_repeat():
                words = f"out of memory with {policy.chunk} rows at a time ({reason})"
                raise OutOfMemory(words, chunk) from error
            log.warning("out of memory with %d rows at a time; going on with %d", policy.chunk, chunk)
        # only here has the error gone, which holds what did not fit
        gc.collect()
        free_memory(policy.model.device)
        policy.chunk = chunk


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
