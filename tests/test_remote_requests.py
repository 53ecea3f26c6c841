"""Requests of several clients to a reward server are scored together, and each client gets its own scores."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from remote_rewards import CPU, THREE, own, remote
from servers import running, until

from posttrain.errors import RewardError
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.scoring.server.batching import Batcher
from posttrain.scoring.server.wire import packed


class Gate:
    """A judge that waits to be let through, and remembers how many images came at a time."""

    def __init__(self):
        self.entered, self.open, self.sizes = threading.Semaphore(0), threading.Event(), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open.set()  # a test that fails must not wait

    def __call__(self, images, prompts, metadata):
        self.sizes.append(len(prompts))
        self.entered.release()
        assert self.open.wait(60)
        if "bad" in prompts:
            raise ValueError("a bad prompt")
        return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


def seen():
    """A kind of Batcher, and a function that says how many jobs wait for the one that was made of it."""
    made = []

    class Seen(Batcher):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    return Seen, lambda: sum(not job.result.done() for job in made[-1]._waiting)


def test_requests_that_wait_are_scored_together_and_each_gets_its_own(monkeypatch):
    gate, (batcher, waiting) = Gate(), seen()
    served = running(own(monkeypatch, gate), batch_size=8, batcher=batcher)
    with served as url, ThreadPoolExecutor(8) as pool, gate:
        score = remote(url, "judge", timeout_seconds=60).load(CPU)

        def ask(i, size=8, prompt=None):
            prompts = [prompt or "p" * i] * 2
            images = torch.full((2, 3, size, size), i / 16)
            return pool.submit(score, images, prompts, [{}] * 2)

        first = ask(1)
        gate.entered.acquire()
        others = [ask(i) for i in (2, 3, 4)]
        until(lambda: waiting() == 3)
        large = ask(5, size=16)
        until(lambda: waiting() == 4)
        bad = ask(6, prompt="bad")
        until(lambda: waiting() == 5)
        gate.open.set()
        for i, future in enumerate([first, *others, large], 1):
            assert future.result().value.tolist() == [i / 16 + i] * 2
        with pytest.raises(RewardError, match="a bad prompt"):
            bad.result()
    # the four of one size together, and each by itself once that had failed; the larger images apart
    assert gate.sizes == [2, 8, 2, 2, 2, 2, 2]


def test_nothing_is_scored_for_a_client_that_has_gone(monkeypatch):
    gate, (batcher, waiting) = Gate(), seen()
    served = running(own(monkeypatch, gate), batcher=batcher)
    with served as url, ThreadPoolExecutor(2) as pool, gate:
        patient = remote(url, "judge", timeout_seconds=60).load(CPU)
        first = pool.submit(patient, *THREE)
        gate.entered.acquire()
        body = packed(*THREE)
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as impatient:
            impatient.sendall(head + body)
            until(lambda: waiting() == 1)
        until(lambda: waiting() == 0)
        gate.open.set()
        first.result()
        patient(*THREE)
    assert gate.sizes == [3, 3]


def test_when_too_much_waits_clients_are_told_to_ask_again(monkeypatch):
    gate, size, (batcher, waiting) = Gate(), len(packed(*THREE)), seen()
    served = running(own(monkeypatch, gate), max_bytes=size, batcher=batcher)
    with served as url, ThreadPoolExecutor(8) as pool, gate:
        score = remote(url, "judge", timeout_seconds=60, retries=12, backoff_seconds=0.02).load(CPU)
        futures = [pool.submit(score, *THREE)]
        gate.entered.acquire()  # alone: requests that come together are scored together
        futures += [pool.submit(score, *THREE) for _ in range(3)]
        until(lambda: waiting() == 3)
        full = httpx.post(f"{url}/score", content=packed(*THREE), trust_env=False, timeout=60)
        assert full.status_code == 503
        futures.append(pool.submit(score, *THREE))
        gate.open.set()
        assert [f.result().value.tolist() for f in futures] == [[1.0] * 3] * 5


def test_many_clients_at_once_get_their_own_scores():
    reward = JpegIncompressibility()
    images = torch.rand(32, 3, 24, 24, generator=torch.manual_seed(2))
    expected = reward.load(CPU)(images, [""] * 32, [{}] * 32).value
    assert len(expected.unique()) > 16
    with running(reward) as url, ThreadPoolExecutor(16) as pool:
        score = remote(url, "jpeg_incompressibility", timeout_seconds=60).load(CPU)
        found = pool.map(lambda i: score(images[i : i + 1], [""], [{}]).value, list(range(32)) * 4)
        assert torch.equal(torch.cat(list(found)), expected.repeat(4))
