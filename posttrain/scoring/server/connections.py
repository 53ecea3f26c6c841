"""Bounds the number of a reward server's connections, and the time that a request and its answer may take.

uvicorn bounds the wait between two requests and the size of a head. It waits for ever for a head, a body, or
a client that does not read its answer.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from posttrain.scoring.server.limits import STALLED_BYTES, STALLED_SECONDS, Limits

KEEP_ALIVE_SECONDS = 75
"""Longer than a client keeps an idle connection, so that none is closed as a request arrives."""
MAX_HEAD_BYTES = 16_384
"""A head that is longer when it is not complete yet is refused."""


class Connection(H11Protocol):
    """A connection that is closed if its client keeps the server waiting."""

    limits: ClassVar[Limits]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._awaited: str | None = None
        """What the client has to send: a "request", the "next" one, or nothing."""
        self._advanced = 0.0
        """When that began or last came on, in the time of the event loop."""
        self._arrived = 0
        """Bytes since then."""
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing tells of every answer that is not taken at once
        self._await("request")
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._arrived += len(data)
        if self._arrived >= STALLED_BYTES:
            self._advanced, self._arrived = self.loop.time(), 0
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.SEND_BODY:
            self._await("request")
        elif self.conn.their_state is h11.IDLE:
            begun, _ = self.conn.trailing_data
            self._await("request" if begun else "next")
        else:
            self._await(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.loop.call_later(self.limits.transfer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unsent is not None:
            self._unsent.cancel()

    def end(self, status: int, reason: str) -> None:
        """Refuse the request that is awaited, and close the connection."""
        if self.conn.our_state is h11.SEND_RESPONSE:  # the request's body is awaited by the application
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self._awaited == "request" and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": reason}).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers.append(("connection", "close"))
            phrase = HTTPStatus(status).phrase.encode()
            head = h11.Response(status_code=status, headers=headers, reason=phrase)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._await(None)
        self.transport.close()

    def _await(self, what: str | None) -> None:
        """Give the client time to send ``what``, beginning now if it was not awaited before."""
        if what == self._awaited:
            return
        self._awaited, self._advanced, self._arrived = what, self.loop.time(), 0
        if self._deadline is not None:
            self._deadline.cancel()
        if what is not None:
            seconds = self.limits.transfer_seconds if what == "request" else KEEP_ALIVE_SECONDS
            self._deadline = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self.end(408, f"the request did not arrive within {self.limits.transfer_seconds:g} s")

    def _make_room(self) -> None:
        """Close the connection that has been idle longest, or else has stalled longest; else this one."""
        stalled = self.loop.time() - STALLED_SECONDS
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        idle = [other for other in others if other.conn.their_state is h11.IDLE]
        slow = [other for other in others if other._awaited and other._advanced < stalled]
        last = min(idle or slow or [self], key=lambda connection: connection._advanced)
        last.end(503, f"{self.limits.max_connections} connections are open already; try again later")
