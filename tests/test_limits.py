"""A reward that hangs ends the run, with the reward's name and the prompts."""

import json
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import posttrain
from runs import HEAD, stage
from servers import until

from posttrain.errors import RewardError
from posttrain.reward import Scores
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.scoring import limited as module
from posttrain.scoring.batches import load_scorers
from posttrain.scoring.judge import Judge
from posttrain.scoring.limited import limited
from posttrain.support.worker import Worker, in_threads

CPU = torch.device("cpu")
IMAGES = torch.zeros(5, 3, 4, 4)
PROMPTS = ["a", "b", "c", "d", "e"]


class Sometimes:
    """Hangs until it is let go, if the first image is white."""

    label, weight, higher_is_better, limit_minutes = "sometimes", 1.0, True, 0.005

    def __init__(self):
        self.go, self.hangs, self.threads, self.grad = threading.Event(), threading.Event(), [], []

    def load(self, device):
        return self.score

    def score(self, images, prompts, metadata):
        self.threads.append(threading.current_thread())
        self.grad.append(torch.is_grad_enabled())
        if images[0].max() > 0:
            self.hangs.set()
            self.go.wait(60)
        return Scores(images.mean((1, 2, 3)))


@pytest.fixture
def sometimes(monkeypatch):
    """The reward, whose limit begins when it hangs: on a slow machine all takes longer."""
    made: Any = Sometimes()
    wait = module.wait

    def patient(futures, seconds):
        until(lambda: futures[0].done() or made.hangs.is_set())
        return wait(futures, seconds)

    monkeypatch.setattr(module, "wait", patient)
    yield made
    made.go.set()


def test_a_reward_that_hangs_is_named_with_its_prompts_and_the_next_call_has_a_thread_of_its_own(sometimes):
    (score,) = load_scorers([sometimes], CPU).values()
    assert score(IMAGES, PROMPTS, [{}] * 5).value.tolist() == [0] * 5
    with pytest.raises(
        RewardError,
        match=r"reward 'sometimes' failed .*: no scores within 0.005 minutes \(limit_minutes\) for the images of "
        "'a', 'b', 'c' and 2 others",
    ):
        score(IMAGES + 1, PROMPTS, [{}] * 5)
    sometimes.hangs.clear()
    assert score(IMAGES, PROMPTS, [{}] * 5).value.tolist() == [0] * 5
    first, hung, after = sometimes.threads
    assert first is hung
    assert hung is not after
    assert after is not threading.current_thread()
    assert sometimes.grad == [False] * 3, "no_grad does not carry over to another thread"


def test_without_a_limit_a_reward_is_called_as_it_is(sometimes):
    sometimes.limit_minutes = None
    assert limited(sometimes, sometimes.score, CPU) == sometimes.score


def test_the_limit_changes_no_result_card():
    assert "limit_minutes" not in JpegIncompressibility(limit_minutes=1).measures()


def test_the_images_and_prompts_of_a_reward_that_hangs_are_kept(sometimes, tmp_path):
    model: Any = SimpleNamespace(device=CPU, decode=lambda latents: latents)
    batch: Any = SimpleNamespace(metadata=[{"prompt": prompt} for prompt in PROMPTS])
    with Judge(model, [sometimes], tmp_path / "failed") as judge:
        future = judge.submit(IMAGES + 1, batch)
        with pytest.raises(RewardError, match="no scores within"):
            future.result()
    kept = [json.loads(line)["prompt"] for line in (tmp_path / "failed" / "prompts.jsonl").open()]
    assert kept == PROMPTS


def test_a_run_ends_though_its_reward_hangs(tmp_path):
    """A thread cannot be ended, so the process must not wait for it."""
    (tmp_path / "hung.py").write_text(
        "import time\ndef score(images, prompts, metadata):\n    time.sleep(600)\n"
    )
    train = "{steps: 2, batch_size: 4, micro_batch: 4, sample_every: null}"
    made = stage(
        "rl",
        "{type: diffusion_nft, group_size: 4, num_steps: 2}",
        train,
        rewards="{'hung:score': {limit_minutes: 0.002}}",
    ).replace("{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 4}, resolution: 16}")
    (tmp_path / "small.yaml").write_text(HEAD + "stages:\n" + made)
    done = posttrain("run", "small.yaml", cwd=tmp_path, code=1)
    assert "reward 'score' failed" in done.stderr
    assert "no scores within 0.002 minutes" in done.stderr
    assert "failed_reward" in done.stderr


def test_a_worker_makes_calls_in_order_and_gives_up_those_that_have_not_begun():
    worker, begun, go, calls = Worker("w"), threading.Event(), threading.Event(), []
    first = worker.submit(lambda: (begun.set(), go.wait(60), calls.append("first")))
    second = worker.submit(calls.append, "second")
    fails = worker.submit(lambda: 1 / 0)
    assert begun.wait(60)
    worker.close(0.01)
    go.set()
    first.result(60)
    while not (second.done() and fails.done()):
        time.sleep(0.01)
    assert calls == ["first"]
    assert second.cancelled()
    other = Worker("w")
    with pytest.raises(ZeroDivisionError):
        other.submit(lambda: 1 / 0).result(60)
    assert other.submit(os.getpid).result(60) == os.getpid()
    other.close(60)
    assert not other._thread.is_alive()


def test_a_limit_may_be_longer_than_a_thread_can_wait():
    (score,) = load_scorers([JpegIncompressibility(limit_minutes=1e12)], CPU).values()
    assert score(IMAGES, PROMPTS, [{}] * 5).value.shape == (5,)


def test_threads_make_each_call_once_and_the_program_does_not_wait_for_them():
    def added(a, b):
        return a + b, threading.current_thread().daemon

    found = in_threads("t", 3, added, range(20), range(100, 120))
    assert [future.result(60) for future in found] == [(100 + 2 * n, True) for n in range(20)]
    one, fails = in_threads("t", 99, lambda n: 1 / n, [1, 0])
    assert one.result(60) == 1
    assert isinstance(fails.exception(60), ZeroDivisionError)
