"""Compiles the transformer's blocks, and runs them uncompiled where that fails."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from posttrain.engine.trial import Sample, try_out
from posttrain.errors import PosttrainError, TrainingError
from posttrain.policy.blocks import blocks
from posttrain.policy.out_of_memory import OutOfMemory, is_out_of_memory, too_little

if TYPE_CHECKING:
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

VARIANTS = 256
"""How many variants of a block dynamo may compile: sizes of images and micro-batches, with and without
gradients. Its own limit is 8."""
OPTIONS: dict[str, Any] = {"dynamic": False}
"""Options of torch.compile. Kernels for fixed sizes are faster, and buckets keep the sizes few."""


def compile_blocks(
    policy: Policy, strategy: Strategy, sample: Sample, kept: float = 1.0, rows: int = 1
) -> str | None:
    """Compile each block separately (regional compilation), so that equal blocks share their code.

    ``kept`` is the share of activations, 0 to 1, that the compiler keeps for the backward, those that are
    dear to compute again.

    The compilation happens in a forward and backward of ``rows`` rows of the ``sample``: each number of rows
    is compiled anew. Returns None, or the reason why the blocks of all processes stay uncompiled: the failure
    of the first process that had one. If the rows do not fit into memory, the blocks are compiled all the
    same. A strategy that does not try alone cannot continue after that: raises TrainingError if not even one
    row fits, else OutOfMemory. Raises TrainingError too if compilation fails under sharded weights, which
    cannot continue after a failure.
    """
    from torch._dynamo import config
    from torch._functorch import config as partitioner

    partitioner.activation_memory_budget = kept
    config.suppress_errors = False  # an earlier stage may have set it
    compiled = blocks(policy.model.transformer)
    # the older name of recompile_limit, which every version of torch accepts
    config.cache_size_limit = max(config.cache_size_limit, VARIANTS)
    for block in compiled:
        block.compile(**OPTIONS)
    try:
        failure = _failure_of_a_trial(policy, strategy, sample, rows)
    except BaseException:
        use_uncompiled(policy)
        raise
    failures = [reason for reason in strategy.world.gather_objects(failure) if reason is not None]
    if not failures:
        # a later size that cannot be compiled then runs uncompiled, with a warning from dynamo
        config.suppress_errors = True
        policy.compiled = True
        return None
    use_uncompiled(policy)
    return failures[0]


def use_uncompiled(policy: Policy) -> None:
    """Let the blocks run as they are, and forget their code."""
    for block in blocks(policy.model.transformer):
        block._compiled_call_impl = None
    policy.compiled = False
    torch.compiler.reset()


def _failure_of_a_trial(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> str | None:
    """Why the compiled blocks cannot run the ``sample`` on this process; None if they can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TF32 and about files left open
            try_out(policy, strategy, sample, rows)
    except PosttrainError:
        raise
    except Exception as error:  # compilers raise errors of any type, and training works without them
        if is_out_of_memory(error):
            if strategy.tries_alone:
                return None
            if rows == 1:
                raise too_little("with one row at a time", error) from error
            raise OutOfMemory(error, rows, rows // 2) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if strategy.layout.sharded:
            raise TrainingError(
                f"compile: {reason}: training cannot continue after this failure, because the weights are "
                "sharded; remove 'compile'"
            ) from error
        return reason
    return None
