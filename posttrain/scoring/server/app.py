"""Serves a reward over HTTP, for :mod:`posttrain.rewards.remote`: ``POST /score`` and ``GET /health``.

:mod:`posttrain.scoring.server.wire` defines the formats. Statuses of errors: 400, the request is malformed;
401, the token is missing or wrong; 408, the request did not arrive in time; 411, the length of the body is
missing; 413, the body is too large; 415, the body is compressed; 422, the reward failed; 431, the head is too
large; 503, the reward has died, or too many requests wait, try again later.
"""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from posttrain.errors import NotFinite, RewardError
from posttrain.reward import Reward, Scores
from posttrain.scoring.server.answers import answer
from posttrain.scoring.server.batching import Batcher
from posttrain.scoring.server.connections import MAX_HEAD_BYTES
from posttrain.scoring.server.limits import Limits, Refused
from posttrain.scoring.server.uploads import Upload, Uploads
from posttrain.scoring.server.wire import unpacked
from posttrain.scoring.server.worker import RewardDied

MAX_WAITING = 4
"""Requests that arrive or wait may hold this many times the size of the largest request in memory."""


class Service:
    """A loaded reward that answers requests."""

    def __init__(self, reward: Reward, batcher: Batcher, limits: Limits, token: str | None) -> None:
        self.reward, self.batcher, self.limits, self.token = reward, batcher, limits, token
        self._uploads = Uploads(MAX_WAITING * limits.max_bytes)

    async def health(self, request: Request) -> dict[str, Any]:
        """The reward's name, range and direction, and the size in bytes of the largest request.

        Raises Refused with the reason if the reward has died.
        """
        self._admit(request)
        if self.batcher.problem is not None:
            raise Refused(503, self.batcher.problem)
        told = getattr(self.reward, "range", (-math.inf, math.inf))  # a plug-in's may lack it
        low, high = (bound if math.isfinite(bound) else None for bound in told)
        return {
            "name": self.reward.label,
            "range": [low, high],
            "higher_is_better": self.reward.higher_is_better,
            "max_bytes": self.limits.max_bytes,
        }

    async def score(self, request: Request) -> JSONResponse:
        """The scores of the images in the request, with the reward's name. Raises Refused."""
        self._admit(request)
        length = self._length(request)
        if self.batcher.ended:
            raise Refused(503, str(self.batcher.problem))
        with self._uploads.upload() as upload:
            try:
                scores = await self._scores(request, upload, length)
            except (ValueError, ClientDisconnect) as error:
                raise Refused(400, str(error) or "the request ended too early") from error
            except RewardDied as error:
                raise Refused(503, str(error)) from error
            except NotFinite as error:
                raise Refused(422, str(error), not_finite=[*error.positions]) from error
            except RewardError as error:
                raise Refused(422, str(error)) from error
            except asyncio.CancelledError as error:  # by uvicorn, after it has waited for a while
                raise Refused(503, "the server is being stopped") from error
        # a client notices by the name if another reward is served at its address meanwhile
        return JSONResponse({"name": self.reward.label, **answer(scores)})

    async def _scores(self, request: Request, upload: Upload, length: int) -> Scores:
        """Receive the request's body, and have it scored while its client waits."""
        body = await upload.received(request.stream(), length)
        # in a thread, since reading the rows and copying the images may take long
        images, prompts, rows = await asyncio.to_thread(unpacked, body)
        scored = asyncio.ensure_future(self.batcher.scores(images, prompts, rows))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({scored, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not scored.done():  # a client that timed out sends its request again: this one is dropped
                raise ClientDisconnect
            return scored.result()
        finally:
            scored.cancel()
            gone.cancel()

    def _admit(self, request: Request) -> None:
        if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEAD_BYTES:
            raise Refused(431, f"the request's headers are longer than {MAX_HEAD_BYTES} bytes")
        given = request.headers.get("authorization", "")
        expected = f"Bearer {self.token}"
        if self.token is not None and not hmac.compare_digest(given.encode(), expected.encode()):
            raise Refused(401, "no token, or a wrong one: it is expected as 'Authorization: Bearer TOKEN'")

    def _length(self, request: Request) -> int:
        """The size of the request's body in bytes, as its header gives it."""
        if "transfer-encoding" in request.headers or "content-length" not in request.headers:
            raise Refused(411, "the request must say its Content-Length, and have no Transfer-Encoding")
        if encoding := request.headers.get("content-encoding"):
            raise Refused(415, f"the request is encoded as {encoding[:40]!r}; send it as it is")
        length = int(request.headers["content-length"])  # h11 has checked that it is a number
        if length > self.limits.max_bytes:
            raise Refused(
                413, f"the request has {length} bytes; at most {self.limits.max_bytes} are taken (--max-mb)"
            )
        return length


async def _gone(request: Request) -> None:
    """Return when the client of ``request``, whose body is received, has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def application(reward: Reward, batcher: Batcher, limits: Limits, token: str | None = None) -> FastAPI:
    """The server's application: ``batcher`` has the worker of ``reward``, and is run and ended by it."""
    service = Service(reward, batcher, limits, token)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()
        await asyncio.wait({running})

    async def refused(request: Request, error: Exception) -> JSONResponse:
        del request
        assert isinstance(error, Refused)
        first = str(error).partition("\n")[0]  # the other lines may quote files of this machine
        # what a reward says may hold lone surrogates, which UTF-8 has no bytes for
        reason = first.encode(errors="backslashreplace").decode()
        return JSONResponse({"error": reason, **error.entries}, error.status)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refused, refused)
    app.get("/health")(service.health)
    app.post("/score")(service.score)
    return app
