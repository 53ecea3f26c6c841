"""Serves a reward over HTTP, for :mod:`posttrain.rewards.remote`: ``POST /score`` and ``GET /health``.

:mod:`posttrain.scoring.server.wire` defines the formats. Statuses of errors: 400, the request is malformed;
401, the token is missing or wrong; 411, the length of the body is missing; 413, the body is too large; 422,
the reward failed; 503, too many requests wait, try again later.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from posttrain.errors import PosttrainError, RewardError
from posttrain.reward import Reward, checked
from posttrain.scoring.server.batching import Batcher
from posttrain.scoring.server.wire import answer, unpacked

MAX_WAITING = 4
"""Requests that arrive or wait may hold this many times the size of the largest request in memory."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):
    """A request that is not scored: the HTTP status, and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Service:
    """A loaded reward that answers requests. Raises RewardError if the reward cannot be loaded."""

    def __init__(
        self, reward: Reward, device: torch.device, *, token: str | None, max_bytes: int, batch_size: int
    ) -> None:
        self.reward, self.token, self.max_bytes = reward, token, max_bytes
        self.batcher = Batcher(checked(reward.label, reward.load(device)), batch_size)
        self._bytes_held = 0

    async def health(self, request: Request) -> dict[str, Any]:
        """The reward's name, range and direction, and the size in bytes of the largest request."""
        self._authorise(request)
        low, high = (bound if math.isfinite(bound) else None for bound in self.reward.range)
        return {
            "name": self.reward.label,
            "range": [low, high],
            "higher_is_better": self.reward.higher_is_better,
            "max_bytes": self.max_bytes,
        }

    async def score(self, request: Request) -> dict[str, Any]:
        """The scores of the images in the request. Raises Refused."""
        self._authorise(request)
        with self._memory(self._length(request)):
            try:
                images, prompts, rows = unpacked(await request.body())
            except (ValueError, ClientDisconnect) as error:
                raise Refused(400, str(error) or "the request ended too early") from error
            try:
                return answer(await self.batcher.scores(images, prompts, rows, request.is_disconnected))
            except RewardError as error:
                raise Refused(422, str(error)) from error

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        expected = f"Bearer {self.token}"
        if self.token is not None and not hmac.compare_digest(given.encode(), expected.encode()):
            raise Refused(401, "no token, or a wrong one: it is expected as 'Authorization: Bearer TOKEN'")

    def _length(self, request: Request) -> int:
        """The size of the request's body in bytes, as its header gives it."""
        given = request.headers.get("content-length", "")
        if not (given.isascii() and given.isdecimal()):
            raise Refused(411, "the request must say its Content-Length")
        if (length := int(given)) > self.max_bytes:
            raise Refused(
                413, f"the request has {length} bytes; at most {self.max_bytes} are taken (--max-mb)"
            )
        return length

    @contextmanager
    def _memory(self, length: int) -> Iterator[None]:
        """Count ``length`` bytes as held within the block; refuse the request if too many are held."""
        if self._bytes_held + length > MAX_WAITING * self.max_bytes:
            raise Refused(503, f"{self._bytes_held} bytes of requests wait already")
        self._bytes_held += length
        try:
            yield
        finally:
            self._bytes_held -= length


def application(
    reward: Reward, device: torch.device, *, token: str | None = None, max_bytes: int, batch_size: int
) -> FastAPI:
    """Load ``reward``, and make the server's application. Raises RewardError."""
    service = Service(reward, device, token=token, max_bytes=max_bytes, batch_size=batch_size)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        worker = asyncio.create_task(service.batcher.run())
        yield
        worker.cancel()

    async def refused(request: Request, error: Exception) -> JSONResponse:
        del request
        assert isinstance(error, Refused)
        return JSONResponse({"error": str(error)}, error.status)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refused, refused)
    app.get("/health")(service.health)
    app.post("/score")(service.score)
    return app


def serve(app: FastAPI, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve ``app`` until interrupted. ``ready`` is called with the address once requests are accepted.

    Port 0 lets the system choose a free one. Raises PosttrainError if the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise PosttrainError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # without it an answer's body arrives 40 ms after its head (Nagle's algorithm, delayed ACK)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listening:
        url_host = f"[{host}]" if ":" in host else host
        ready(f"http://{url_host}:{listening.getsockname()[1]}")
        # longer than a client keeps an idle connection, so that none is closed as a request arrives
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75)
        uvicorn.Server(config).run(sockets=[listening])


def check_exposure(host: str, token: str | None) -> None:
    """Raise PosttrainError if the network could reach the server and no token is asked for."""
    if host not in LOOPBACK and token is None:
        raise PosttrainError(
            f"--host {host} is open to the network: also give --token-env VAR, the variable with a token"
        )
