"""Sends one HTTP request and takes its answer, both bounded in time and the answer in size.

httpx bounds the wait for each packet. A server that sends a byte a minute, or does not end, would hold a run
for ever. So requests run in an event loop, on a thread of its own, where the whole of one can be cut off,
looking up the address included.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

MAX_ANSWER_BYTES = 4_000_000
"""Largest answer. As Python objects it may take 20 times as much."""
EXCERPT_CHARACTERS = 200
"""An error shows this much of a server's answer."""


class NoAnswer(Exception):
    """A request without a whole answer; another one may have one. The message says why."""


class BadAnswer(Exception):
    """An answer that would be as bad the next time, or an address that is none. The message says why."""


@dataclass(frozen=True)
class Answer:
    """A server's whole answer, as it was sent."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The JSON in the answer. Raises ValueError if it is none."""
        try:
            return json.loads(self.body)
        except RecursionError as error:
            raise ValueError("it nests too deep") from error

    def excerpt(self) -> str:
        """The beginning of the answer's text, on one line. What is not printable is escaped."""
        # 4 bytes make a character at most, and white space is made shorter
        words = self.body[: 8 * EXCERPT_CHARACTERS].decode(errors="replace").split()
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(words))
        return text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}..."


class Link:
    """Connections to a server, kept open from one request to the next. Threads may share it."""

    def __init__(self, headers: Mapping[str, str], seconds: float) -> None:
        """Each request with ``headers``; it and its answer may take ``seconds`` in all."""
        import httpx

        self.seconds = seconds
        self._loop = _event_loop(os.getpid())
        # a compressed answer could be any size when unpacked
        headers = {**headers, "Accept-Encoding": "identity"}
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=False)
        weakref.finalize(self, _close, self._client, self._loop).atexit = False

    def request(self, method: str, url: str, **body: Any) -> Answer:
        """The answer to a request with httpx's ``body``. Raises NoAnswer or BadAnswer."""
        import httpx

        try:
            return asyncio.run_coroutine_threadsafe(self._request(method, url, body), self._loop).result()
        except TimeoutError as error:
            raise NoAnswer(f"no answer within {self.seconds:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, ExceptionGroup) as error:
            # UnicodeError: a host that cannot be a name; ExceptionGroup: of anyio, for a port that cannot be
            final = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
            passing = isinstance(error, (httpx.TransportError, OSError)) and not isinstance(error, final)
            raise (NoAnswer if passing else BadAnswer)(_reason(error)) from error

    async def _request(self, method: str, url: str, body: Mapping[str, Any]) -> Answer:
        async with asyncio.timeout(self.seconds), self._client.stream(method, url, **body) as response:
            if encoding := response.headers.get("content-encoding"):
                raise BadAnswer(f"the answer is encoded as {encoding[:40]!r}, which was not asked for")
            received = bytearray()
            async for part in response.aiter_raw():
                received += part
                if len(received) > MAX_ANSWER_BYTES:
                    raise BadAnswer(
                        f"status {response.status_code}, and an answer of more than {MAX_ANSWER_BYTES} bytes"
                    )
            return Answer(response.status_code, bytes(received))


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all requests of this process; a forked one needs another."""
    loop = asyncio.new_event_loop()
    # a daemon, so that no open request keeps the process from ending
    threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
    return loop


def _close(client: httpx.AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop)


def _reason(error: BaseException) -> str:
    """What the system said, if it did, below what libraries made of it."""
    below, said = error, str(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)
    while below is not None:
        if isinstance(below, BaseExceptionGroup):
            below = below.exceptions[-1]
        # a name that is not found has a number below 0, which is none of the system
        if isinstance(below, OSError) and (number := below.errno or 0) > 0:
            said = os.strerror(number)
        below = below.__cause__ or below.__context__
    return said or type(error).__name__
