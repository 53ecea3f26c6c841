"""Samples of the policy in groups of one prompt, and their scores: the base class of online algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Tools, Verdict
from posttrain.distributed.world import World
from posttrain.errors import NotFinite, RewardError, StepRefused
from posttrain.flow.advantages import has_spread, mean_group_std, weighted
from posttrain.flow.solvers import Solver
from posttrain.sampling.latents import sample_latents
from posttrain.support.heartbeat import beat

WAIT_SECONDS = 0.5
"""Time between two looks at whether a signal came, while scores are awaited."""


class Rollouts(Algorithm, ABC):
    """Sample ``group_size`` images of each prompt, and score them with the stage's rewards."""

    needs: ClassVar = "prompts"
    uses_rewards: ClassVar = True

    group_size: int = Field(default=24, ge=2)
    """Samples of one prompt, which are compared with each other."""
    num_steps: int = Field(default=10, ge=2, le=10_000)
    """Sampling steps of the rollout."""

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size

    def as_given(self, batch: Batch) -> Batch:
        return replace(batch, latents=torch.empty_like(batch.latents, device="meta"))

    @abstractmethod
    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean latents (n, c, h, w) of new samples, and fields (n, ...) of each to be kept."""

    def sampled(
        self, batch: Batch, tools: Tools, guidance_scale: float, solver: Solver, role: str | None = None
    ) -> Tensor:
        """Clean latents (n, c, h, w) of new samples, drawn by ``role`` without noise after the first."""
        noise = tools.draws.normal("initial", batch.latents.shape[1:])
        prompts, sigmas = (batch.conditions, batch.prompt_index), tools.sigmas(self.num_steps)
        with tools.policy.using(role):
            return sample_latents(tools.policy, *prompts, noise, sigmas, guidance_scale, solver)

    def scored_by_all(
        self, batch: Batch, tools: Tools
    ) -> tuple[dict[str, Tensor], Verdict, Tensor, Mapping[str, float]]:
        """The fields of this process's samples, and of all processes' samples (N) the scores and the groups
        (N,) int64; and the weights of the rewards. Raises as :meth:`sampled_and_scored`."""
        assert tools.judge is not None, "uses_rewards"
        assert batch.group is not None, "needs = 'prompts'"
        fields, own_verdict = self.sampled_and_scored(batch, tools)
        verdict = of_all_processes(own_verdict, tools.world)
        return fields, verdict, tools.world.gather(batch.group.cpu()), tools.judge.weights

    def sampled_and_scored(self, batch: Batch, tools: Tools) -> tuple[dict[str, Tensor], Verdict]:
        """The fields of :meth:`rollout`, and the scores of this process's samples.

        Samples are drawn in micro-batches; rewards score one micro-batch while the next is drawn. The first
        reward that fails stops the rollout with its own error. Images and scores that are not finite do not:
        sharded weights need the rollouts of all processes, and then all raise StepRefused.
        """
        assert tools.judge is not None, "uses_rewards"
        pending: list[Future[Verdict]] = []
        parts: list[dict[str, Tensor]] = []
        try:
            for start in range(0, len(batch), tools.policy.micro_batch):
                for future in pending:
                    if future.done() and not isinstance(future.exception(), NotFinite):
                        future.result()  # raises the error of a reward that failed
                beat()
                tools.world.stop_if_told()  # a resumed stage samples the whole batch again
                index = slice(start, start + tools.policy.micro_batch)
                micro_batch = batch.take(index)
                latents, fields = self.rollout(micro_batch, replace(tools, draws=tools.draws.take(index)))
                pending.append(tools.judge.submit(latents, micro_batch))
                parts.append(fields)
            verdict = _joined(pending, batch, tools)
            tools.world.stop_if_told()  # later the batch's steps are finished
        finally:
            for future in pending:
                future.cancel()  # after an error no score that is still to come is needed
        # each part is freed as soon as it is joined: the fields are the largest tensors of an iteration
        return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}, verdict


def _joined(pending: Sequence[Future[Verdict]], batch: Batch, tools: Tools) -> Verdict:
    """The scores of the batch's micro-batches.

    Raises StepRefused if a process has one that is not finite, and RewardError if details differ, in which
    processes would exchange other scores than they mean to.
    """
    verdicts: list[Verdict] = []
    bad: list[dict[str, Any]] = []
    for i, future in enumerate(pending):
        try:
            verdicts.append(_awaited(future, tools.world))
        except NotFinite as error:
            places = batch.sample_index[i * tools.policy.micro_batch :].tolist()
            bad += [{"sample": places[p], "reason": str(error)} for p in error.positions]
    of_ranks = tools.world.gather_objects((bad, {tuple(sorted(v.details)) for v in verdicts}))
    if reasons := [r["reason"] for of_rank, _ in of_ranks for r in of_rank]:
        raise StepRefused(f"a reward ({reasons[0]})", bad)
    if len(details := sorted(set().union(*(names for _, names in of_ranks)))) > 1:
        both = f"{[*details[0]]} and {[*details[-1]]}"
        raise RewardError(
            f"some images have the details {both}: a reward must give equal details for all images"
        )
    return Verdict.cat(verdicts)


def _awaited(future: Future[Verdict], world: World) -> Verdict:
    """The result of ``future``. Raises Stopped if one process alone is told to stop while it waits."""
    while not wait([future], WAIT_SECONDS).done:
        beat()  # rewards have a time limit of their own
        if world.size == 1:  # with several, the others wait for other scores
            world.stop_if_told()
    return future.result()


def of_all_processes(verdict: Verdict, world: World) -> Verdict:
    """The scores of all processes' samples, in the order of the ranks."""
    return Verdict(
        {name: world.gather(scores) for name, scores in verdict.rewards.items()},
        {name: world.gather(verdict.details[name]) for name in sorted(verdict.details)},  # equal everywhere
    )


def reward_metrics(verdict: Verdict, weights: Mapping[str, float], group: Tensor) -> dict[str, Tensor]:
    """What to record of the scores: the weighted sum's mean and spread, and the mean of each score."""
    total = weighted(verdict.rewards, weights)
    metrics = {
        "reward": total.mean(),
        "reward_std": total.std(correction=0),
        "reward_group_std": mean_group_std(total, group),
        "groups_without_spread": 1 - has_spread(total, group).double().mean(),
    }
    scores = {**verdict.rewards, **verdict.details}
    return metrics | {f"reward/{name}": values.mean() for name, values in scores.items()}
