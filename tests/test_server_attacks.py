"""A reward server refuses in words whatever is sent to it, and goes on answering good requests."""

import gzip
import itertools
import json
import re
import select
import socket
import struct
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest
import torch
from servers import running, until

from posttrain.reward import Scores
from posttrain.rewards.callable import Callable
from posttrain.rewards.remote import Remote
from posttrain.scoring.server import connections, uploads
from posttrain.scoring.server.wire import packed

CPU = torch.device("cpu")
SECONDS = 1.0
"""How long a hurried server waits for a request, and for its answer to be taken."""
PATIENT = 60.0
"""What would show a fault waits as long: a slow machine is none."""
IMAGE = torch.full((1, 3, 8, 8), 0.5)
PIXELS = IMAGE.numpy().tobytes()
GOOD = packed(IMAGE, ["a"], [{}])


def judge(images, prompts, metadata):
    """A reward that does what a prompt says: a fault if one asks for it, so that no batch hides a fault."""
    answers = {"nan": [float("nan")], "inf": [float("inf")], "few": [], "none": None, "text": ["good"]}
    faults = {
        "raise": ValueError("not\ud800 \x1b[31m so"),
        "memory": MemoryError("no more"),
        "deep": RecursionError("x"),
    }
    said = next((name for name in (*faults, *answers, "spoil") if name in prompts), "a")
    if said in faults:
        raise faults[said]
    scores = answers.get(said, [float(image.mean()) for image in images])
    if said == "spoil":
        images.zero_()
        prompts.clear()
        metadata.clear()
    return scores


def head(length, *headers, version="1.1", start="POST /score"):
    lines = [
        f"{start} HTTP/{version}",
        "Host: x",
        *([] if length is None else [f"Content-Length: {length}"]),
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post(body, *headers, **settings):
    return head(len(body), *headers, **settings) + body


def file(prompts='["a"]', rows="[{}]", data=PIXELS, text=None, length=None, **other):
    """A request's body, any part of which may lie."""
    image = {"dtype": "F32", "shape": [1, 3, 8, 8], "data_offsets": [0, len(data)]} | other.pop("image", {})
    header = {"__metadata__": {"prompts": prompts, "rows": rows}, "images": image} | other
    text = json.dumps(header).encode() if text is None else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def shaped(*shape, **image):
    return post(file(image={"shape": shape, **image}))


def said(prompt):
    return post(packed(IMAGE, [prompt], [{}]))


def nested(depth):
    return "[" * depth + "]" * depth


def sent(data):
    def attack(connection):
        connection.sendall(data)

    return attack


def endless(start, *parts):
    def attack(connection):
        connection.sendall(start)
        for part in itertools.cycle(parts):
            connection.sendall(part)
            time.sleep(0.02)  # all run in this process, and leave it time

    return attack


def drip(data):
    return endless(b"", *(bytes([byte]) for byte in data))


CHUNKED = head(None, "Transfer-Encoding: chunked")
LATE = f"408 Request Timeout.*did not arrive within {SECONDS:g} s"
ATTACKS = {
    # time
    "nothing": (sent(b""), LATE),
    "half a head": (sent(b"POST /score HT"), LATE),
    "a head byte by byte": (drip(head(1, f"X: {'x' * 900}")), LATE),
    "no body": (sent(head(100)), LATE),
    "half a body": (sent(post(GOOD)[:-1]), LATE),
    "a body byte by byte": (drip(post(GOOD)), LATE),
    "a second request that does not end": (sent(post(GOOD) + b"GET"), rf"200 OK.*0\.5.*{LATE}"),
    "an endless body": (endless(CHUNKED, b"5\r\nhello\r\n"), "411 "),
    "a length, and an endless body": (endless(CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n", b"5\r\nhello\r\n"), "411 "),
    "an endless body of a length": (endless(head(10**18), b"x" * 65536), "413 .*at most 8000000 are taken"),
    # HTTP
    "an endless head": (endless(head(1)[:-2], b"X: y\r\n" * 999), "4(00|31) "),
    "a head of 100 kB": (sent(post(GOOD, f"X: {'x' * 100_000}")), "4(00|31) "),
    "10,000 headers": (sent(post(GOOD, *[f"X{i}: y" for i in range(10_000)])), "4(00|31) "),
    "no length": (sent(head(None)), "411 .*must say its Content-Length"),
    "chunks": (sent(CHUNKED + b"1\r\nx\r\n0\r\n\r\n"), "411 "),
    "a negative length": (sent(head(-1)), "400 "),
    "a length of words": (sent(head("five")), "400 "),
    "a length of 4,000 digits": (sent(head("9" * 4000)), "400 "),
    "two lengths": (sent(head(1, "Content-Length: 2")), "400 "),
    "too much": (sent(head(8_000_001)), r"413 .*8000001 bytes; at most 8000000 are taken \(--max-mb\)"),
    "more than its length": (sent(post(GOOD) + b"\0\xff more\r\n\r\n"), r"200 OK.*0\.5.*400 "),
    "compressed": (sent(post(gzip.compress(GOOD), "Content-Encoding: gzip")), "415 .*encoded as 'gzip'"),
    "another protocol": (sent(bytes.fromhex("16030100a5010000a103") + b"\0" * 99), "400 "),
    "HTTP/2": (sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "4"),
    "no method of ours": (sent(head(0, start="BREW /score")), "405 "),
    "no path of ours": (sent(head(0, start="GET /../../etc/passwd")), "404 "),
    "no characters": (sent(b"GET /\xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n"), "400 "),
    "an upgrade": (sent(head(0, "Upgrade: websocket", "Connection: upgrade", start="GET /health")), "200 OK"),
    # what is good, though old or odd
    "HTTP/1.0": (sent(post(GOOD, version="1.0")), r"200 OK.*0\.5"),
    "another type": (sent(post(GOOD, "Content-Type: text/xml; charset=zlib")), r"200 OK.*0\.5"),
    "one after the other": (sent(post(GOOD) * 3), r"(200 OK.*0\.5.*){3}"),
    "asked before sending": (sent(post(GOOD, "Expect: 100-continue")), r"100 .*200 OK.*0\.5"),
    "10,000 keys": (sent(post(file(rows=json.dumps([dict.fromkeys(map(str, range(10_000)))])))), "200 OK"),
    "a header that is not aligned": (sent(post(file(prompts='["aaaa"]'))), "200 OK"),
    "32 levels": (sent(post(file(rows=f'[{{"a":{nested(31)}}}]'))), "200 OK"),
    # the body
    "no file": (sent(post(b"")), "400 .*not a safetensors file: it has 0 bytes"),
    "a header longer than the file": (sent(post(file(length=2**63))), "400 .*a header of 9223372036854775808 bytes"),
    "a header that is no JSON": (sent(post(file(text=b"{x"))), "400 .*not JSON"),
    "a header that is no text": (sent(post(file(text=b'{"\xff'))), "400 .*not JSON"),
    "a deep header": (sent(post(file(text=nested(100_000).encode()))), "400 .*it nests too deep"),
    "a header of another kind": (sent(post(file(text=b'["images"]'))), r"400 .*it has \['images'\]"),
    "a long text": (sent(post(file(prompts=json.dumps(["x" * 4_000_000])))), "400 .*at most 4000000 are taken"),
    "1,000 more tensors": (sent(post(file(**{f"e{i}": {} for i in range(1000)}))), "400 .*one tensor, 'images'"),
    "no metadata": (sent(post(file(__metadata__=None))), "400 .*must have 'prompts' and 'rows'"),
    "prompts that are no JSON": (sent(post(file(prompts="a"))), "400 .*must have 'prompts' and 'rows'"),
    "prompts that are no texts": (sent(post(file(prompts="[1]"))), "400 .*prompts must be a list of texts"),
    "half a character": (sent(post(file(prompts='["\\ud800"]'))), "400 .*half a character"),
    "rows that are no objects": (sent(post(file(rows='["a"]'))), "400 .*rows must be a list of objects"),
    "deep rows": (sent(post(file(rows=f'[{{"a":{nested(100_000)}}}]'))), "400 .*it nests too deep"),
    "33 levels": (sent(post(file(rows=f'[{{"a":{nested(32)}}}]'))), "400 .*more than 32 deep"),
    "a number of 5,000 digits": (sent(post(file(rows=f'[{{"a":{"9" * 5000}}}]'))), "400 .*5000 digits"),
    "two rows for an image": (sent(post(file(rows="[{}, {}]"))), "400 .*1 images, 1 prompts and 2 rows"),
    "a declared 50,000 x 50,000": (sent(shaped(1, 3, 50_000, 50_000)), "400 .*50000 x 50000; sides may have up to 8192"),
    "a declared 8,000 x 8,000": (sent(shaped(1, 3, 8000, 8000)), "400 .*need 768000000 bytes, not 768"),
    "a strip": (sent(shaped(1, 3, 1, 64)), "400 .*1 x 64; .*the longer side up to 16 times the shorter"),
    "a million images": (sent(shaped(10**6, 3, 1, 1)), "400 .*1000000 images; at most 4096"),
    "no images": (sent(shaped(0, 3, 8, 8)), r"400 .*must be \(n, 3, h, w\) float32"),
    "a negative size": (sent(shaped(1, 3, -8, -8)), r"400 .*must be \(n, 3, h, w\)"),
    "a size of 30 digits": (sent(shaped(10**30, 3, 8, 8)), "400 .*at most 4096"),
    "a size that is true": (sent(shaped(True, 3, 8, 8)), r"400 .*must be \(n, 3, h, w\)"),
    "grey images": (sent(shaped(3, 1, 8, 8)), r"400 .*must be \(n, 3, h, w\)"),
    "sizes in words": (sent(post(file(image={"shape": "x" * 10**6}))), r"400 .*must be \(n, 3, h, w\)"),
    "8-bit images": (sent(shaped(1, 3, 8, 8, dtype="U8")), r"400 .*must be \(n, 3, h, w\) float32, .*'U8'"),
    "bytes that lie elsewhere": (sent(shaped(1, 3, 8, 8, data_offsets=[0, 10**12])), "400 .*need 768 bytes"),
    "bytes that are missing": (sent(post(file(data=b"1234"))), "400 .*need 768 bytes, not 4"),
    # the reward
    "a reward that raises": (sent(said("raise")), r"422 .*failed on prompts such as 'raise': ValueError: not\\\\ud800 \\u001b\[31m so.}$"),
    "a reward without memory": (sent(said("memory")), "422 .*no more"),
    "a reward that recurs": (sent(said("deep")), "422 "),
    "a reward that says nan": (sent(said("nan")), "422 .*returned nan"),
    "a reward that says inf": (sent(said("inf")), "422 .*returned inf"),
    "a reward that says too little": (sent(said("few")), r"422 .*shape \(0,\) for 1 images"),
    "a reward that says nothing": (sent(said("none")), "422 .*failed on prompts"),
    "a reward that says words": (sent(said("text")), "422 .*failed on prompts"),
    "a reward that spoils what it gets": (sent(said("spoil")), "(200|422) "),
}  # fmt: skip


@pytest.fixture(scope="module")
def served():
    """A reward that a server in this process can load."""
    sys.modules["attacked"] = types.ModuleType("attacked")
    sys.modules["attacked"].judge = judge
    yield Callable(function="attacked:judge")
    del sys.modules["attacked"]


@contextmanager
def connected(url, buffered=None):
    with socket.socket() as connection:
        if buffered:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffered)
        connection.settimeout(PATIENT)
        connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        yield connection


def heard(connection, words="$.^"):
    """All that the server says until it closes the connection, or until that begins with ``words``."""
    said = bytearray()
    with suppress(OSError):
        while not re.match(words, said.decode(errors="ignore"), re.DOTALL):
            if not (part := connection.recv(65536)):
                break
            said += part
    return said.decode()


def answer(url, attack, words="$.^"):
    with connected(url) as connection:
        with suppress(OSError):  # it has heard enough
            attack(connection)
        return heard(connection, words)


def status(words):
    return rf"HTTP/1\.1 {words}"


@pytest.fixture(scope="module")
def attacked(served):
    """The addresses of two servers under all attacks at once, and their answers.

    The one that is in a hurry gets those that take time, and no others: on a slow machine all do."""
    serving = partial(running, served, max_bytes=8_000_000)
    with (
        serving(transfer_seconds=SECONDS) as hurried,
        serving(transfer_seconds=PATIENT) as patient,
        ThreadPoolExecutor(len(ATTACKS)) as pool,
    ):
        answers = {}
        for name, (attack, words) in ATTACKS.items():
            url = hurried if LATE in words or "endless body" in name else patient
            answers[name] = pool.submit(answer, url, attack, status(words))
        yield (hurried, patient), answers


def scored(url, count=1, **settings):
    reward = Remote(url=url, name="judge", timeout_seconds=PATIENT, backoff_seconds=0.1, **settings)
    return reward.load(CPU)(IMAGE.expand(count, -1, -1, -1), ["a"] * count, [{}] * count).value.tolist()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_answered_in_words(attacked, name):
    said = attacked[1][name].result()
    assert re.match(status(ATTACKS[name][1]), said, re.DOTALL), said[-500:]
    assert "Internal Server Error" not in said


def test_after_all_attacks_good_requests_are_answered(attacked):
    urls, answers = attacked
    for future in answers.values():
        future.result()
    for url in urls:
        assert scored(url, 3) == [0.5] * 3


class Talkative(Callable):
    """The same scores, with as many details as make an answer larger than what systems hold for a connection."""

    type: str = "talkative"

    def load(self, device):
        score = super().load(device)

        def scores(*those):
            value = score(*those).value
            return Scores(value, {f"d{i}": value for i in range(100)})

        return scores


def test_a_client_that_does_not_read_is_cut_off(served, monkeypatch):
    lost, connection_lost = [], connections.Connection.connection_lost
    monkeypatch.setattr(
        connections.Connection,
        "connection_lost",
        lambda *those: (connection_lost(*those), lost.append(those)),
    )
    monkeypatch.setattr(
        connections.Connection, "_await", lambda self, what: None
    )  # requests may take any time
    many = packed(torch.full((4096, 3, 1, 1), 0.1), ["a"] * 4096, [{}] * 4096)  # its answer has 8 MB
    with running(Talkative(function=served.function), transfer_seconds=0.1, buffered=4096) as url:
        with connected(url, buffered=4096) as deaf:
            deaf.sendall(post(many))
            until(lambda: lost)
            said = heard(deaf)
            assert said.startswith("HTTP/1.1 200 OK")
            head, _, body = said.partition("\r\n\r\n")
            assert len(body) < int(re.search(r"content-length: (\d+)", head)[1])
        assert scored(url) == [0.5]


def at_once(monkeypatch):
    """A request has stalled after a moment already."""
    for module in (connections, uploads):
        monkeypatch.setattr(module, "STALLED_SECONDS", 0.1)


@pytest.mark.parametrize("begun", [b"", b"POST", post(GOOD)[:-1]], ids=["idle", "half a head", "half a body"])
def test_connections_that_wait_make_room_for_others(served, begun, monkeypatch):
    at_once(monkeypatch)
    with running(served, max_connections=8) as url, ExitStack() as stack:
        waiting = [stack.enter_context(connected(url)) for _ in range(8)]
        for connection in waiting:
            connection.sendall(begun)
        time.sleep(0.2)
        assert scored(url) == [0.5]


def test_connections_beyond_the_bound_are_refused_if_all_are_busy(served, monkeypatch):
    monkeypatch.setattr(connections, "STALLED_SECONDS", 99)
    read, handle = set(), connections.Connection.handle_events
    monkeypatch.setattr(connections.Connection, "handle_events", lambda self: (handle(self), read.add(self)))
    with running(served, max_connections=2) as url, connected(url) as one, connected(url) as two:
        for connection in (one, two):
            connection.sendall(post(GOOD)[:-1])
        until(lambda: len(read) == 2)
        assert "503 Service Unavailable" in (said := answer(url, sent(b"")))
        assert "2 connections are open already" in said
        one.sendall(post(GOOD)[-1:])
        assert "200 OK" in heard(one, status("200 OK"))


def test_uploads_that_stall_make_room_for_others(served, monkeypatch):
    at_once(monkeypatch)
    taken, make_room = [], uploads.Uploads.make_room
    monkeypatch.setattr(
        uploads.Uploads, "make_room", lambda *those: (make_room(*those), taken.append(those[-1]))
    )
    large = post(packed(torch.zeros(1, 3, 128, 128), ["a"], [{}]))
    size = len(large) - len(head(len(large)))
    with running(served, max_bytes=size) as url, ExitStack() as stack:
        claims = [stack.enter_context(connected(url)) for _ in range(8)]
        for claim in claims[:4]:  # what is only announced takes no memory
            claim.sendall(head(size))
        assert scored(url, retries=0) == [0.5]
        taken.clear()
        for claim in claims[4:]:
            claim.sendall(large[:-1])
        until(lambda: sum(taken) == 4 * (size - 1))
        assert scored(url, 200) == [0.5] * 200
        refused, _, _ = select.select(claims[4:], [], [], PATIENT)
        assert "503 " in heard(refused[0], ".*arrived too slowly")
