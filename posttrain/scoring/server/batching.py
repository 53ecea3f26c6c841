"""Scores the waiting requests of a reward server together, in batches.

Requests arrive while a batch is scored. The next batch takes them in order, if their images have the same
size as the first one's and fit into the batch. No request waits for more requests to arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import RewardError
from posttrain.reward import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.reward import Scorer


@dataclass(frozen=True, eq=False)
class Job:
    """A request: the images to score, and the future that its handler awaits."""

    images: Tensor
    prompts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    gone: Callable[[], Awaitable[bool]]
    """Whether the client has closed its connection."""
    result: asyncio.Future[Scores]


class Batcher:
    """A thread that scores batches of up to ``batch_size`` images; a larger request is a batch of its own."""

    def __init__(self, score: Scorer, batch_size: int) -> None:
        self.score, self.batch_size = score, batch_size
        self._waiting: list[Job] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    async def scores(
        self,
        images: Tensor,
        prompts: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        gone: Callable[[], Awaitable[bool]],
    ) -> Scores:
        """Queue a request, and return its scores once :meth:`run` has them. Raises RewardError."""
        job = Job(images, prompts, rows, gone, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._wake.set()
        return await job.result

    async def run(self) -> None:
        """Score requests until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                if not (jobs := await self._next_batch()):
                    self._wake.clear()
                    continue
                for job, result in await loop.run_in_executor(self._thread, self._scored, jobs):
                    if job.result.done():
                        continue
                    if isinstance(result, Scores):
                        job.result.set_result(result)
                    else:
                        job.result.set_exception(result)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _next_batch(self) -> list[Job]:
        """Take the jobs of the next batch off the queue.

        Jobs whose client has gone are dropped. A client that timed out sends its request again, and that one
        should not wait behind the old one.
        """
        for job in [job for job in self._waiting if await job.gone()]:
            self._waiting.remove(job)
            if not job.result.done():
                job.result.set_exception(RewardError("the client has gone"))
        batch: list[Job] = []
        for job in self._waiting:
            same_size = not batch or job.images.shape[1:] == batch[0].images.shape[1:]
            if same_size and (not batch or sum(len(j.prompts) for j in (*batch, job)) <= self.batch_size):
                batch.append(job)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _scored(self, jobs: Sequence[Job]) -> list[tuple[Job, Scores | Exception]]:
        """Each of ``jobs`` with its scores, or with the error that it raised when scored alone."""
        prompts = [prompt for job in jobs for prompt in job.prompts]
        rows = [row for job in jobs for row in job.rows]
        try:
            scores = self.score(torch.cat([job.images for job in jobs]), prompts, rows)
        except Exception as error:  # of any kind, since every waiting client must get an answer
            if len(jobs) == 1:
                return [(jobs[0], error if isinstance(error, RewardError) else RewardError(str(error)))]
            # score one by one, so that only the faulty request fails
            return [pair for job in jobs for pair in self._scored([job])]
        counts = [len(job.prompts) for job in jobs]
        values = scores.value.split(counts)
        details = {name: v.split(counts) for name, v in scores.details.items()}
        return [
            (job, Scores(values[i], {name: of_jobs[i] for name, of_jobs in details.items()}))
            for i, job in enumerate(jobs)
        ]
