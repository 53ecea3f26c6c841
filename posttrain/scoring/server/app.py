"""How does a reward answer over HTTP, for :mod:`posttrain.rewards.remote`? ``POST /score``, ``GET /health``.

Formats are those of :mod:`posttrain.scoring.server.wire`. 400: not understood; 401: no or a wrong token;
411, 413: a body of unknown length, or too large; 422: the reward failed; 503: too much waits, ask again.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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

HELD = 4
"""How many times the largest request may be in memory, of requests that arrive or wait."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):
    """A request that is not scored: its status, and why."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def application(
    reward: Reward, device: torch.device, *, token: str | None = None, max_bytes: int, batch_size: int
) -> FastAPI:
    """The server's application, the reward loaded. Raises RewardError."""
    batcher = Batcher(checked(reward.label, reward.load(device)), batch_size)
    held = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        del request
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        _authorised(request, token)
        low, high = (bound if math.isfinite(bound) else None for bound in reward.range)
        return {
            "name": reward.label,
            "range": [low, high],
            "higher_is_better": reward.higher_is_better,
            "max_bytes": max_bytes,
        }

    @app.post("/score")
    async def score(request: Request) -> dict[str, Any]:
        nonlocal held
        _authorised(request, token)
        length = _length(request, max_bytes)
        if held + length > HELD * max_bytes:
            raise Refused(503, f"{held} bytes of requests wait already")
        held += length
        try:
            try:
                images, prompts, rows = unpacked(await request.body())
            except (ValueError, ClientDisconnect) as error:
                raise Refused(400, str(error) or "the request ended too early") from error
            try:
                return answer(await batcher.scores(images, prompts, rows, request.is_disconnected))
            except RewardError as error:
                raise Refused(422, str(error)) from error
        finally:
            held -= length

    return app


def serve(app: FastAPI, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Answer until interrupted; ``ready`` is told the address. Port 0 lets the system choose one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise PosttrainError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # connections inherit it; an answer's head and body would otherwise be 40 ms apart (Nagle, delayed ACK)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listening:
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        # a client that holds its connection must not hit one that is closed just then
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75)
        uvicorn.Server(config).run(sockets=[listening])


def check_exposure(host: str, token: str | None) -> None:
    """Raise PosttrainError where anybody on the network could use the server."""
    if host not in LOOPBACK and token is None:
        raise PosttrainError(
            f"--host {host} is open to the network: give --token-env VAR, a variable that holds a token, too"
        )


def _authorised(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refused(401, "no token, or a wrong one: it is expected as 'Authorization: Bearer TOKEN'")


def _length(request: Request, max_bytes: int) -> int:
    given = request.headers.get("content-length", "")
    if not (given.isascii() and given.isdecimal()):
        raise Refused(411, "the request must say its Content-Length")
    if (length := int(given)) > max_bytes:
        raise Refused(413, f"the request has {length} bytes; at most {max_bytes} are taken (--max-mb)")
    return length
