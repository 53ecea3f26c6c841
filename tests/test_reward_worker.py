"""A reward that hangs or dies is told by its server, started again once, and never takes the server along."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import forked
import httpx
import pytest
import torch
from servers import ended, running, until

from posttrain.errors import NotFinite, RewardError
from posttrain.rewards.callable import Callable
from posttrain.rewards.remote import Remote
from posttrain.scoring.server import listen
from posttrain.scoring.server import worker as workers
from posttrain.scoring.server.wire import packed
from posttrain.scoring.server.worker import RewardDied, Worker

CPU = torch.device("cpu")
IMAGES = torch.full((2, 3, 8, 8), 0.5)
JUDGE = """
import os, time

def judge(images, prompts, metadata):
    open("pid", "w").write(str(os.getpid()))
    if "hang" in prompts:
        open("hangs", "w").close()
        time.sleep(1e6)
    return [float(image.mean()) for image in images]
"""


@pytest.fixture
def worker(monkeypatch):
    """Makes workers, by a server of copies: they start sooner than processes of their own, and unlike copies
    of this process they share none of its threads."""
    copies = multiprocessing.get_context("forkserver")
    copies.set_forkserver_preload(["posttrain.scoring.server.worker", "posttrain.rewards.callable"])
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: copies)
    made = []

    def make(function="served_rewards:judge", seconds=60.0):
        made.append(Worker(Callable(function=function), CPU, seconds))
        return made[-1]

    yield make
    for each in made:
        each.close()


def said(worker, prompt="a"):
    return worker(IMAGES, [prompt] * 2, [{}, {"more": 1}])


def test_a_score_that_is_not_finite_is_told_with_its_place_and_the_worker_goes_on(worker):
    made = worker()
    made.start()
    with pytest.raises(NotFinite, match="returned nan for prompt 'b'") as error:
        made(IMAGES, ["a", "b"], [{}, {"more": float("nan")}])
    assert error.value.positions == [1]
    assert said(made).value.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("hang", r"no scores within 0\.4 s"),
        ("stop", r"no scores within 0\.4 s"),
        ("vanish", "its process ended with exit code 9"),
        ("exit", "its process ended with exit code 3"),
        ("kill", r"its process was killed by SIGKILL \(out of memory\?\)"),
        ("segfault", "its process was killed by SIGSEGV"),
        ("interrupt", "its process ended with exit code 1"),
    ],
)
def test_a_death_is_told_with_its_reason_and_a_new_start_scores(worker, prompt, reason):
    made = worker()
    made.start()
    with pytest.raises(RewardError, match="failed on prompts such as 'raise': ValueError: not so"):
        said(made, "raise")
    assert said(made).value.tolist() == [0.5, 1.5]
    first = made._process.pid
    if "0\\.4 s" in reason:
        made.seconds = 0.4
    with pytest.raises(RewardDied, match=f"the reward 'judge' has died: {reason}"):
        said(made, prompt)
    with pytest.raises(RewardDied, match=f"the reward 'judge' has died: {reason}"):
        said(made)
    made.seconds = 60
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    made.start()
    assert said(made).value.tolist() == [0.5, 1.5]


def test_a_reward_that_does_not_load_is_an_error(worker):
    with pytest.raises(RewardError, match="cannot load the reward 'served_rewards:nobody'"):
        worker("served_rewards:nobody").start()


def test_a_worker_that_is_closed_while_it_scores_or_starts_ends(worker):
    made = worker()
    made.start()
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(said, made, "hang")
        until(lambda: scoring.running())
        made.close()
        with pytest.raises(RewardDied):
            scoring.result()
    with pytest.raises(RewardDied):
        made.start()


def test_scores_that_arrive_as_their_time_is_up_end_no_process(worker, monkeypatch):
    timers = []

    class Timer(threading.Timer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            timers.append(self)

    monkeypatch.setattr(workers.threading, "Timer", Timer)
    judged = worker()
    judged.start()
    first = said(judged)
    (late,) = timers
    late.function(*late.args)  # as if it had fired just before it was cancelled
    assert said(judged).value.tolist() == first.value.tolist()


def test_an_error_after_which_cuda_cannot_be_used_is_a_death(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def score(*_):
        raise RewardError("reward 'x' failed")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    cuda = torch.device("cuda")
    kind, reason = workers._scored(score, IMAGES, ["a"] * 2, [{}] * 2, cuda)
    assert (kind, reason) == ("died", "reward 'x' failed (CUDA error: device-side assert triggered)")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert workers._scored(score, IMAGES, ["a"] * 2, [{}] * 2, cuda)[0] == "error"


def post(url, prompt="a"):
    body = packed(IMAGES[:1], [prompt], [{}])
    return httpx.post(f"{url}/score", content=body, timeout=60, trust_env=False)


def health(url):
    return httpx.get(f"{url}/health", timeout=60, trust_env=False)


def test_a_reward_that_dies_takes_health_along_and_is_started_again_once(worker, monkeypatch):
    made, seen = worker(), threading.Event()
    made.start()
    start, slowly = made.start, lambda: (seen.wait(60), start())
    monkeypatch.setattr(made, "start", slowly)
    with running(made) as url, ThreadPoolExecutor(1) as pool:
        assert health(url).status_code == 200
        made.seconds = 0.4
        died = post(url, "hang")
        made.seconds = 60
        assert (died.status_code, died.json()["error"]) == (
            503,
            "the reward 'judge' has died: no scores within 0.4 s",
        )
        assert (ill := health(url)).status_code == 503
        assert ill.json()["error"] == f"{died.json()['error']}. It is being started again"
        waits = pool.submit(post, url)  # a request in the meantime is not lost
        seen.set()
        assert waits.result().json() == {"name": "judge", "value": [0.5], "details": {}}
        assert health(url).status_code == 200
        assert post(url, "vanish").status_code == 503
        for answer in (health(url), post(url)):
            assert answer.status_code == 503
            assert answer.json()["error"].endswith(
                "exit code 9. That was the second time: start the server again"
            )


def test_a_reward_that_does_not_start_again_is_told(worker, monkeypatch):
    made = worker()
    made.start()

    def start():
        raise RewardError("its weights are gone")

    monkeypatch.setattr(made, "start", start)
    with running(made) as url:
        assert post(url, "vanish").status_code == 503
        for answer in (post(url), health(url)):
            assert answer.status_code == 503
            assert answer.json()["error"].endswith("It does not start again: its weights are gone")


def test_a_run_goes_on_after_the_death_of_its_reward(worker, tmp_path):
    made, row = worker("served_rewards:dies_once"), {"once": str(tmp_path / "once")}
    made.start()
    with running(made) as url:
        score = Remote(url=url, name="dies_once", retries=1, backoff_seconds=0.01).load(CPU)
        assert score(IMAGES, ["a", "b"], [row, row]).value.tolist() == [1.0, 1.0]


def serve_hung():
    """The command, with copies of this process for workers."""
    fork = multiprocessing.get_context("fork")
    workers.multiprocessing.get_context = lambda _: fork
    forked._main("serve-reward", "hung:judge", "--port", "0", "--device", "cpu")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_ends_with_its_reward_though_that_hangs(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(listen, "STOP_SECONDS", 1)
    (tmp_path / "hung.py").write_text(JUDGE)
    with (tmp_path / "out").open("w") as out:
        server = forked.start(serve_hung, out=out, cwd=tmp_path)
        try:
            until(lambda: (tmp_path / "out").read_text().endswith("\n"))
            url = (tmp_path / "out").read_text().split()[1]
            assert post(url).json()["value"] == [0.5]
            child = int((tmp_path / "pid").read_text())
            with ThreadPoolExecutor(1) as pool:
                waits = pool.submit(post, url, "hang")
                until((tmp_path / "hangs").exists)
                os.kill(server.pid, ending)
                server.join(60)
                assert server.exitcode is not None
            if ending == signal.SIGKILL:
                assert isinstance(waits.exception(), httpx.TransportError)
            else:
                assert (waits.result().status_code, waits.result().json()["error"]) == (
                    503,
                    "the server is being stopped",
                )
        finally:
            server.kill()
    until(lambda: ended(child))
