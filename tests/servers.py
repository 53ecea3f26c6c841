"""Servers on the loopback, for the tests of what speaks HTTP."""

import hashlib
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import uvicorn

from posttrain.reward import checked
from posttrain.rewards._link import Link
from posttrain.scoring.server.app import application
from posttrain.scoring.server.batching import Batcher
from posttrain.scoring.server.limits import Limits
from posttrain.scoring.server.listen import configured

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # clients that leave are what is tested
            super().handle_error(request, client_address)


@contextmanager
def serving(handler):
    """The address of a server that answers with ``handler``, a BaseHTTPRequestHandler."""
    server = Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Here:
    """A reward in this process, in place of a Worker."""

    def __init__(self, reward):
        self.reward = reward
        self.start()

    def start(self):
        self.score = checked(self.reward.label, self.reward.load(torch.device("cpu")))

    def __call__(self, images, prompts, rows):
        return self.score(images, prompts, rows)

    def close(self):
        pass


@contextmanager
def running(reward, token=None, batch_size=64, port=0, batcher=Batcher, buffered=None, **limits):
    """The address of a server of ``reward``, a Reward or its worker, in a thread.

    The system holds ``buffered`` bytes, or as many as it likes, of an answer that is not read.
    """
    limits = Limits(**{"max_bytes": 64_000_000, **limits})
    worker = reward if hasattr(reward, "close") else Here(reward)
    app = application(worker.reward, batcher(worker, batch_size), limits, token)
    server = uvicorn.Server(configured(app, limits))
    with socket.create_server(("127.0.0.1", port)) as listening:
        if buffered:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffered)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def until(condition):
    """Wait for ``condition``, a minute at most."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("never came true")


def patient_first(monkeypatch, seconds):
    """Links wait ``seconds`` for what they GET, such as /health, whatever the time limit for what they POST."""
    request = Link.request

    def patient(self, method, url, **body):
        limit = self.seconds
        self.seconds = seconds if method == "GET" else limit
        try:
            return request(self, method, url, **body)
        finally:
            self.seconds = limit

    monkeypatch.setattr(Link, "request", patient)


def ended(pid):
    """Whether the process has ended, or is a zombie that waits to be told of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0] == "Z"
    except FileNotFoundError:
        return True


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, body, status=200, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Hub:
    """What huggingface_hub needs of a hub. ``repos`` is {repository: {file: (bytes, in LFS?)}}."""

    def __init__(self, repos):
        self.repos = repos
        self.sent = {}
        """File -> what is sent in place of its bytes."""
        self.cuts = []
        """Bytes after which the next downloads' connections are cut; None: not."""
        self.elsewhere = None
        """Where downloads of LFS files are sent on to, as hubs do: this server under another name."""
        self.tokens = []
        """(path, token) of each download."""
        self.ranges = []
        """The Range header of each download."""

    def handler(hub):
        class Handler(Quiet):
            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = self.path.partition("?")[0]
                for repo, files in hub.repos.items():
                    if path == f"/api/models/{repo}/revision/main":
                        siblings = [hub.entry(name, *files[name], "rfilename") for name in files]
                        return self.reply({"id": repo, "sha": COMMIT, "siblings": siblings})
                    if path == f"/api/models/{repo}/tree/{COMMIT}":
                        rows = [hub.entry(name, *files[name], "path") for name in files]
                        return self.reply([{"type": "file", "oid": r.pop("blobId"), **r} for r in rows])
                    for name in files:
                        if path in (f"/{repo}/resolve/{COMMIT}/{name}", f"/elsewhere/{name}"):
                            return self.download(name, *files[name])
                return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

            def download(self, name, content, lfs):
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.hash(content, lfs)}"'}
                if self.command == "HEAD":
                    return self.reply(content, 200, "application/octet-stream", **headers)
                hub.tokens.append((self.path, self.headers.get("Authorization")))
                if lfs and hub.elsewhere and not self.path.startswith("/elsewhere"):
                    return self.reply(b"", 302, Location=f"{hub.elsewhere}/elsewhere/{name}")
                asked = self.headers.get("Range")
                hub.ranges.append(asked)
                body = hub.sent.get(name, content)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                self.send_response(206 if asked else 200)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body) - start))
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.end_headers()
                cut = hub.cuts.pop(0) if hub.cuts else None
                self.wfile.write(body[start:cut])
                if cut is not None:
                    self.close_connection = True
                return None

        return Handler

    @staticmethod
    def hash(content, lfs):
        if lfs:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def entry(self, name, content, lfs, key):
        row = {key: name, "size": len(content), "blobId": self.hash(content, False)}
        if lfs:
            row["lfs"] = {"sha256": self.hash(content, True), "size": len(content), "pointerSize": 130}
            row["lfs"]["oid"] = row["lfs"]["sha256"]
        return row
