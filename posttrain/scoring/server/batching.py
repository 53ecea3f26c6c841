"""Scores the waiting requests of a reward server together, in batches, and starts a dead reward once again.

Requests arrive while a batch is scored. The next batch takes them in order, if their images have the same
size as the first one's and fit into the batch. No request waits for more requests to arrive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import RewardError
from posttrain.reward import Scores
from posttrain.scoring.server.worker import RewardDied

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.scoring.server.worker import Worker

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, eq=False)
class Job:
    """A request: the images to score, and the future that its handler awaits, or has cancelled."""

    images: Tensor
    prompts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    result: asyncio.Future[Scores]


class Batcher:
    """Has ``worker`` score batches of up to ``batch_size`` images; a larger request is a batch of its own."""

    def __init__(self, worker: Worker, batch_size: int) -> None:
        self.worker, self.batch_size = worker, batch_size
        self.problem: str | None = None
        """Why nothing can be scored at this time."""
        self.ended = False
        """Whether the reward is dead for good."""
        self._deaths = 0
        self._waiting: list[Job] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    async def scores(
        self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """Queue a request, and return its scores once :meth:`run` has them. Raises RewardError.

        That is RewardDied if the reward dies over it, or is dead. While the reward is started again, requests
        wait.
        """
        if self.ended:
            raise RewardDied(self.problem)
        job = Job(images, prompts, rows, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._wake.set()
        return await job.result

    async def run(self) -> None:
        """Score requests until cancelled, and then end the worker."""
        try:
            while not self.ended:
                await self._wake.wait()
                if not (jobs := self._next_batch()):
                    self._wake.clear()
                    continue
                results = await self._in_thread(self._scored, jobs)
                for job, result in results:
                    _give(job, result)
                if died := [result for _, result in results if isinstance(result, RewardDied)]:
                    await self._start_again(str(died[0]))
            for job in self._waiting:
                _give(job, RewardDied(self.problem))
        finally:
            self.worker.close()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _start_again(self, reason: str) -> None:
        """Start the worker again if that has not been done before; else nothing is scored any more."""
        self._deaths += 1
        self.ended = self._deaths > 1
        if self.ended:
            self.problem = f"{reason}. That was the second time: start the server again"
        else:
            self.problem = f"{reason}. It is being started again"
            log.error(self.problem)
            try:
                await self._in_thread(self.worker.start)
            except Exception as error:  # of any kind, or requests would wait for ever
                self.ended = True
                self.problem = f"{reason}. It does not start again: {error}"
            else:
                self.problem = None
                log.warning("the reward %r works again", self.worker.reward.label)
        if self.problem is not None:
            log.error(self.problem)

    async def _in_thread(self, work, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _next_batch(self) -> list[Job]:
        """Take the jobs of the next batch off the queue, and drop those whose clients have gone."""
        self._waiting = [job for job in self._waiting if not job.result.done()]
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
            images = jobs[0].images if len(jobs) == 1 else torch.cat([job.images for job in jobs])
            scores = self.worker(images, prompts, rows)
        except RewardDied as error:
            return [(job, error) for job in jobs]
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


def _give(job: Job, result: Scores | Exception) -> None:
    """Let the handler of ``job`` go on, unless its client has gone."""
    if job.result.done():
        return
    if isinstance(result, Scores):
        job.result.set_result(result)
    else:
        job.result.set_exception(result)
