"""A run that asks a hostile reward server gets one clear error, in bounded time and memory."""

import gzip
import itertools
import json
import select
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from servers import patient_first

from posttrain.errors import RewardError
from posttrain.rewards.remote import Remote
from posttrain.rewards.unifiedreward import UnifiedReward

CPU = torch.device("cpu")
SECONDS = 0.3
PATIENT = 60.0
"""What would show a fault waits as long: a slow machine is none."""
HEALTH = {"name": "judge", "range": [0, 1], "higher_is_better": True}


def answer(body, *headers, status="200 OK", length=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {length}", *headers, "", ""]).encode() + body


def endless(start, *parts, wait=0.02):
    def attack(connection):
        connection.sendall(start)
        for part in itertools.cycle(parts):
            connection.sendall(part)
            time.sleep(wait)

    return attack


def said(data):
    return lambda connection: connection.sendall(data)


def hang(connection):
    """Say nothing until the client has gone, and what it sent is still unread."""
    gone = select.poll()
    gone.register(connection, select.POLLRDHUP)
    gone.poll(1000 * PATIENT)


def scores(**other):
    return said(answer({"value": [0.5], **other}))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LATE = rf"asked once in .*, the last time: no answer within {SECONDS:g} s"
CUT = r"asked once in .*, the last time: .*(closed|disconnected|complete)"
ATTACKS = {
    # time
    "silence": (hang, LATE),
    "an answer byte by byte": (endless(answer(b"", length=10**6), b" "), LATE),
    "a head byte by byte": (endless(b"HTTP/1.1 200 OK\r\nX: ", b"y"), LATE),
    "a head line by line": (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), LATE),
    "wait, wait, wait": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), LATE),
    # size
    "an endless answer": (endless(CHUNKED, b"ffff\r\n" + b" " * 65535 + b"\r\n", wait=0), "more than 4000000 bytes"),
    "a long answer": (said(answer(b" " * 5_000_000)), "more than 4000000 bytes"),
    "an error without end": (
        endless(CHUNKED.replace(b"200 OK", b"500 X"), b"ffff\r\n" + b" " * 65535 + b"\r\n", wait=0),
        "status 500, and an answer of more than 4000000 bytes",
    ),
    "an endless head": (endless(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 65536, wait=0), "asked once .*too"),
    "a bomb": (said(answer(gzip.compress(b" " * 10**7), "Content-Encoding: gzip")), "encoded as 'gzip'"),
    # breaks
    "nothing": (said(b""), CUT),
    "half a head": (said(b"HTTP/1.1 200 OK\r\nConte"), CUT),
    "half an answer": (said(answer(b"{", length=99)), CUT),
    "half a chunk": (said(CHUNKED + b"ff\r\n{"), CUT),
    "less than promised, by far": (said(answer(b"{}", length=10**15)), CUT),
    "another protocol": (said(b"SSH-2.0-OpenSSH_9.6\r\n"), "asked once .*"),
    "two lengths": (said(answer(b"{}", "Content-Length: 3")), "asked once .*"),
    "an error each time": (said(answer({"error": "no"}, status="503 X")), 'asked once .*status 503: {"error": "no"}'),
    # answers that are none
    "a circle": (said(answer(b"", "Location: /score", status="302 Found")), "status 302"),
    "no content": (said(b"HTTP/1.1 204 No Content\r\n\r\n"), "not scores: "),
    "more than promised": (said(answer(b'{"value": [0.5]}', length=9)), "not scores: "),
    "nests": (said(answer(b"[" * 1_000_000)), "not scores: it nests too deep"),
    "no text": (said(answer(b'{"value": "\xff\xfe"}')), "not scores: "),
    "an odd type": (said(answer(b"<html>", "Content-Type: text/html; charset=zlib_codec")), "not scores: .*<html>"),
    "escapes": (said(answer(b"\x1b[2J\x07\x00 [red]x", status="404 X")), r"status 404: \\x1b\[2J\\x07\\x00 \[red\]x$"),
    "long words": (said(answer(b"x" * 10**6, status="404 X")), r"status 404: x{200}\.\.\.$"),
    "a long value": (scores(value=["x" * 10**6]), r"value: 'x{79}\.\.\. is no number"),
    "5,000 digits": (said(answer(b'{"value": [' + b"9" * 5000 + b"]}")), "not scores: .*5000 digits"),
    "10,000 details": (scores(details={f"d{i}": [1] for i in range(10_000)}), "10000 details; at most 100"),
    "a detail of two lines": (scores(details={"a\nb": [1]}), r"a detail has the name 'a\\nb'"),
    "a detail of a long name": (scores(details={"a" * 99: [1]}), "a detail has the name 'aaaa"),
}  # fmt: skip


@contextmanager
def serving(attack, health=None):
    """The address of a server that does ``attack`` on every connection but those for /health."""

    def talk(connection):
        with connection, suppress(OSError):
            connection.settimeout(PATIENT)
            asked = bytearray()
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(65536)
            if asked.startswith(b"GET"):
                # or the client may send its next request over this connection, and find it closed only then
                return connection.sendall(answer(HEALTH if health is None else health, "Connection: close"))
            if attack is not hang:
                head, _, body = asked.partition(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                while len(body) < length:
                    body += connection.recv(65536)
            attack(connection)

    def listen():
        with suppress(OSError):
            while True:
                threading.Thread(target=talk, args=listening.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def ask(url, side=8, **settings):
    reward = Remote(url=url, name="judge", **{"timeout_seconds": PATIENT, "retries": 0, **settings})
    return reward.load(CPU)(torch.zeros(1, 3, side, side), ["a"], [{}])


@pytest.fixture
def patient_health(monkeypatch):
    """/health may take its time, however little an answer with scores may take."""
    patient_first(monkeypatch, PATIENT)


@pytest.mark.usefixtures("patient_health")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_an_attack_is_one_error(name):
    attack, words = ATTACKS[name]
    with serving(attack) as url, pytest.raises(RewardError, match=rf"^{url}/score: .*{words}") as error:
        ask(url, timeout_seconds=SECONDS if words == LATE else PATIENT)
    assert len(str(error.value)) < 600


def test_answers_that_do_not_fit_together_are_an_error():
    answers = itertools.cycle([{"x": [1]}, {}])
    with serving(lambda connection: scores(details=next(answers))(connection)) as url:
        score = Remote(url=url, name="judge", batch_size=1).load(CPU)
        with pytest.raises(RewardError, match=rf"{url}: answers have different details: \['x'\] and \[\]"):
            score(torch.zeros(2, 3, 8, 8), ["a"] * 2, [{}] * 2)


def test_connections_are_closed_with_the_scorer():
    ended = threading.Event()

    def once(connection):
        scores()(connection)
        ended.set() if connection.recv(1) == b"" else None

    with serving(once) as url:
        ask(url)
        assert ended.wait(PATIENT)


@pytest.mark.usefixtures("patient_health")
def test_a_server_that_does_not_read_holds_a_run_no_longer_than_one_that_does_not_answer():
    with serving(hang) as url, pytest.raises(RewardError, match=LATE):
        ask(url, side=1024, timeout_seconds=SECONDS)


def test_the_error_says_how_often_and_how_long_was_asked():
    words = r"/score: asked 3 times in (?!0\.0)\d+\.\d s, the last time: status 500"
    with serving(said(answer({}, status="500 X"))) as url, pytest.raises(RewardError, match=words):
        ask(url, retries=2, backoff_seconds=0.05)


@pytest.mark.parametrize(
    "health",
    [
        b"",
        b"<html>",
        b"[" * 100_000,
        [],
        {},
        {**HEALTH, "range": None},
        {**HEALTH, "range": [0]},
        {**HEALTH, "range": ["low", "high"]},
        {**HEALTH, "range": [[], {}]},
        {**HEALTH, "range": [-(10**400), 10**400]},
    ],
)
def test_a_health_that_is_none_is_one_error(health):
    with serving(hang, health) as url, pytest.raises(RewardError, match=f"{url}: no reward server"):
        ask(url, lowest=0)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1", "asked once in .*Connection refused"),
        ("http://name.invalid", "asked once in .*, the last time: "),
        ("http://127.0.0.1:99999", "port must be 0-65535"),
        ("http://127.0.0.1:port", "Invalid port"),
        ("http://[::1", "Invalid port"),
        ("http://a\u0378", "Invalid IDNA hostname"),
    ],
)
def test_an_address_that_is_none_is_one_error(url, words):
    with pytest.raises(RewardError, match=words):
        ask(url)


def test_a_name_that_is_looked_up_for_ever_is_an_error(monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: told.wait(PATIENT))
    with pytest.raises(RewardError, match=f"no answer within {SECONDS:g} s"):
        ask("http://a.name.that.hangs", timeout_seconds=SECONDS)
    told.set()


def test_attacks_are_errors_of_the_other_rewards_behind_http_too():
    for attack, words in (ATTACKS["an answer byte by byte"], ATTACKS["an endless answer"]):
        with serving(attack) as url:
            reward = UnifiedReward(url=url, timeout_seconds=SECONDS if words == LATE else PATIENT, retries=0)
            score = reward.load(CPU)
            with pytest.raises(RewardError, match=f"{url}/chat/completions: .*{words}"):
                score(torch.zeros(1, 3, 8, 8), ["a"], [{}])
