"""Tells what becomes of the options of accelerate's and torchrun's launchers."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.importing.draft import Draft
from posttrain.importing.flags import BARE

NEAREST = {
    "mixed_precision": "train.precision: bf16, or the trainer's own flag",
    "gradient_accumulation_steps": "the trainer's own flag; it multiplies the batch",
    "config_file": "its precision, accumulation and processes as flags: the file is not read",
    "use_deepspeed": "parallel: {strategy: deepspeed}",
    "zero_": "parallel: {strategy: deepspeed}",
    "deepspeed": "parallel: {strategy: deepspeed}",
    "offload": "parallel: {strategy: deepspeed}, or fsdp2, with offload",
    "use_fsdp": "parallel: {strategy: fsdp2}",
    "fsdp": "parallel: {strategy: fsdp2}",
    "dynamo": "train.compile: true",
}
"""How the names begin of options that change the training, and what comes nearest."""


def tell(options: Mapping[str, object], draft: Draft) -> None:
    """List the launcher's ``options`` in the account of ``draft``: those that change the training as lost."""
    for option, value in options.items():
        told = f"the launcher's --{option}" + ("" if value is BARE else f" {value}")
        name = option.replace("-", "_")
        nearest = next((words for start, words in NEAREST.items() if name.startswith(start)), None)
        if nearest is None:
            draft.more_idle.append((told, "how processes start: posttrain run --nproc or torchrun does it"))
        else:
            draft.more_lost.append((told, nearest))
