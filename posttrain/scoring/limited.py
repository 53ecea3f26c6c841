"""Gives a reward a time limit, so that one that hangs stops the run instead of keeping it for ever."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import RewardError
from posttrain.support.heartbeat import beat
from posttrain.support.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.reward import Reward, Scorer, Scores

NAMED = 3
"""An error shows this many prompts."""


def limited(reward: Reward, score: Scorer, device: torch.device) -> Scorer:
    """``score``, called in a thread of its own. It raises RewardError if there are no scores in time.

    Python cannot end a thread. One that hangs is left alone, and the next call has a new one.
    """
    minutes, name = reward.limit_minutes, reward.label
    if minutes is None:
        return score
    worker: Worker | None = None

    def in_thread(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own current device
        with torch.no_grad():
            return score(images, prompts, metadata)

    def call(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        nonlocal worker
        beat()
        if worker is None:
            worker = Worker(f"reward {name}")
        future = worker.submit(in_thread, images, prompts, metadata)
        if not wait([future], min(minutes * 60, threading.TIMEOUT_MAX)).done:
            worker = None
            named = ", ".join(map(repr, prompts[:NAMED]))
            others = f" and {len(prompts) - NAMED} others" if len(prompts) > NAMED else ""
            raise RewardError(
                f"no scores within {minutes:g} minutes (limit_minutes) for the images of {named}{others}"
            )
        return future.result()

    return call
