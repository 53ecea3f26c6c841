"""A forward and backward that is only tried: on what, how long it took, and that nothing is left of it."""

from types import SimpleNamespace

import pytest
import torch
from lines import Line, descending, line_policy

from posttrain.condition import Conditions
from posttrain.engine import trial

LACK = torch.OutOfMemoryError("CUDA out of memory")


def test_a_trial_leaves_no_gradient_no_bill_and_no_change():
    policy = line_policy(2)
    policy.forward_equivalents = 5
    told = []
    strategy = descending(policy)
    strategy.begin_micro_batch = lambda *, last: told.append(last)
    sample = (torch.ones(1, 2, 2), Conditions({"c": torch.tensor([3.0, 9.0])}))
    trial.try_out(policy, strategy, sample, 4)
    assert policy.model.seen == [(4, True, None)]
    assert (policy.forward_equivalents, policy.trained["a"].grad, told) == (5, None, [False])
    assert policy.largest_forward == 4
    strategy.backward = lambda loss: told.append(loss.item()) or (_ for _ in ()).throw(LACK)
    with pytest.raises(torch.OutOfMemoryError):
        trial.try_out(policy, strategy, sample, 2)
    assert policy.forward_equivalents == 5
    assert told == [False, False, 0]


def test_a_trial_runs_on_blank_rows_of_the_empty_prompt():
    model, asked = Line(), []
    model.latent_shape = lambda *size: asked.append(size) or (1, 2, 2)
    latents, conditions = trial.blank(model, SimpleNamespace(largest=(16, 8)))
    assert (asked, latents.shape, latents.any().item()) == ([(16, 8)], (1, 2, 2), False)
    assert torch.equal(conditions.table["c"], model.encode_prompts([""])["c"])
    policy, seen = line_policy(), []
    velocity = policy.model.velocity
    policy.model.velocity = lambda *given: seen.append(given) or velocity(*given)
    sample = (torch.arange(6.0).view(1, 2, 3), Conditions({"c": torch.tensor([3.0, 9.0])}))
    trial.try_out(policy, descending(policy), sample, 2)
    ((latents, sigma, condition),) = seen
    assert torch.equal(latents, torch.stack([sample[0]] * 2))
    assert (sigma.tolist(), condition["c"].tolist()) == ([0.5, 0.5], [3, 3])


def test_a_trial_takes_the_fastest_of_three_and_its_peak(monkeypatch):
    clock, peaks, calls = iter([0, 9, 10, 12, 20, 25]), iter([500, 800]), []
    monkeypatch.setattr(trial.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(trial, "peak_memory", lambda device: next(peaks))
    for name in ("reset_peak_memory", "synchronize"):
        monkeypatch.setattr(trial, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(trial, "try_out", lambda *given: calls.append(given))
    policy = line_policy()
    assert trial.timed(policy, "strategy", "sample", 4) == (2, 300)
    once = ["synchronize", (policy, "strategy", "sample", 4), "synchronize"]
    assert calls == ["reset_peak_memory", *once * 3]
    clock, peaks = iter(range(6)), iter([500, 400])
    assert trial.timed(policy, "strategy", "sample", 4) == (1, 0)
