"""Are the transformer's blocks compiled, and what happens where they cannot be?"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from posttrain.parallel.fsdp2 import blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

VARIANTS = 256
"""Sizes of images and micro-batches, with and without gradients, that one block's code may be compiled for;
dynamo by itself gives up after 8."""
OPTIONS: dict[str, Any] = {"dynamic": False}
"""Of torch.compile: kernels for sizes that are known are faster, and buckets make few sizes."""


def compile_blocks(transformer: nn.Module, try_out: Callable[[], None]) -> str | None:
    """Compile each block by itself (regional compilation), so that one code serves all blocks alike.

    ``try_out`` is a forward and backward, in which they are compiled first. Returns None, or why the blocks
    run as they are, since that failed.
    """
    from torch._dynamo import config

    # the older name of recompile_limit, which every version knows
    config.cache_size_limit = max(config.cache_size_limit, VARIANTS)
    for block in blocks(transformer):
        block.compile(**OPTIONS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TF32 that could be used, of files that are left open
            try_out()
    except Exception as error:  # whatever a compiler may say: the run needs none
        for block in blocks(transformer):
            block._compiled_call_impl = None
        torch.compiler.reset()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    # a size that comes later and cannot be compiled runs as it is, and dynamo says so
    config.suppress_errors = True
    logging.getLogger("torch._dynamo").setLevel(logging.WARNING)
    return None
