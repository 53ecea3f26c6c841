"""How are the requests that wait for a reward scored together?

While one batch is scored, requests gather; the next batch is as many of them, in order, as have images of
one size and fit into it. No request waits for others to come.
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
    """A request: what to score, and where its scores are awaited."""

    images: Tensor
    prompts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    gone: Callable[[], Awaitable[bool]]
    """Whether nobody waits for the scores any more."""
    result: asyncio.Future[Scores]


class Batcher:
    """One thread that scores at most ``most`` images at a time; a request of more goes by itself."""

    def __init__(self, score: Scorer, most: int) -> None:
        self.score, self.most = score, most
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
        """The scores of one request. Raises RewardError."""
        job = Job(images, prompts, rows, gone, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._wake.set()
        return await job.result

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                if not (jobs := await self._next()):
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

    async def _next(self) -> list[Job]:
        """The jobs of the next batch, which no longer wait. Who has gone is not scored for: a client that
        has given up asks again, and would be behind its own old request."""
        for job in [job for job in self._waiting if await job.gone()]:
            self._waiting.remove(job)
            if not job.result.done():
                job.result.set_exception(RewardError("the client has gone"))
        batch: list[Job] = []
        for job in self._waiting:
            alike = not batch or job.images.shape[1:] == batch[0].images.shape[1:]
            if alike and (not batch or sum(len(j.prompts) for j in (*batch, job)) <= self.most):
                batch.append(job)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _scored(self, jobs: Sequence[Job]) -> list[tuple[Job, Scores | Exception]]:
        prompts = [prompt for job in jobs for prompt in job.prompts]
        rows = [row for job in jobs for row in job.rows]
        try:
            scores = self.score(torch.cat([job.images for job in jobs]), prompts, rows)
        except Exception as error:  # nobody who waits may be left without an answer
            if len(jobs) == 1:
                return [(jobs[0], error if isinstance(error, RewardError) else RewardError(str(error)))]
            # one request's fault must not be the others'
            return [pair for job in jobs for pair in self._scored([job])]
        sizes = [len(job.prompts) for job in jobs]
        values = scores.value.split(sizes)
        details = {name: v.split(sizes) for name, v in scores.details.items()}
        return [
            (job, Scores(values[i], {name: parts[i] for name, parts in details.items()}))
            for i, job in enumerate(jobs)
        ]
