"""Are the transformer's blocks compiled, and what happens where they cannot be?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from posttrain.engine.trial import Sample, try_out
from posttrain.errors import PosttrainError, TrainingError
from posttrain.policy.blocks import blocks
from posttrain.policy.out_of_memory import is_out_of_memory, too_little

if TYPE_CHECKING:
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

VARIANTS = 256
"""Sizes of images and micro-batches, with and without gradients, that one block's code may be compiled for;
dynamo by itself gives up after 8."""
OPTIONS: dict[str, Any] = {"dynamic": False}
"""Of torch.compile: kernels for sizes that are known are faster, and buckets make few sizes."""


def compile_blocks(policy: Policy, strategy: Strategy, sample: Sample) -> str | None:
    """Compile each block by itself (regional compilation), so that one code serves all blocks alike.

    They are compiled in a forward and backward of the ``sample``. Returns None, or why the blocks run as they
    are in all processes, since that failed in one. Raises TrainingError where a strategy that has weights in
    parts cannot go on after a failure, or memory does not suffice.
    """
    from torch._dynamo import config

    parts, reason = blocks(policy.model.transformer), None
    # the older name of recompile_limit, which every version knows
    config.cache_size_limit = max(config.cache_size_limit, VARIANTS)
    for block in parts:
        block.compile(**OPTIONS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TF32 that could be used, of files that are left open
            try_out(policy, strategy, sample, 1)
    except PosttrainError:
        raise
    except Exception as error:  # whatever a compiler may say: the run needs none
        if is_out_of_memory(error):
            raise too_little("with one row at a time", error) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if strategy.layout.sharded:
            words = f"compile: {reason}: weights in parts do not allow to go on after this; remove 'compile'"
            raise TrainingError(words) from error
    if not (reasons := [found for found in strategy.world.gather_objects(reason) if found is not None]):
        # a size that comes later and cannot be compiled runs as it is, and dynamo says so
        config.suppress_errors = True
        return None
    for block in parts:
        block._compiled_call_impl = None
    torch.compiler.reset()
    return reasons[0]
