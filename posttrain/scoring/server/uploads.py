"""Takes the bodies of requests into a bounded memory; slow ones make room for others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from time import monotonic

from posttrain.scoring.server.limits import STALLED_BYTES, STALLED_SECONDS, Refused


class Upload:
    """A request's body, from its first byte until the request is answered."""

    def __init__(self, uploads: Uploads) -> None:
        self.held = 0
        """Bytes of the memory that it takes."""
        self.arriving = True
        self.advanced = monotonic()
        """When it last had brought another STALLED_BYTES."""
        self._advanced_at = 0
        self._uploads = uploads

    async def received(self, chunks: AsyncIterator[bytes], length: int) -> bytearray:
        """The whole body of ``length`` bytes. Raises Refused if it has more, or if memory runs short."""
        body = bytearray()
        try:
            async with asyncio.timeout(None) as self._patience:
                async for chunk in chunks:
                    if len(body) + len(chunk) > length:
                        raise Refused(400, f"the request has more bytes than its Content-Length of {length}")
                    self._uploads.make_room(self, len(chunk))
                    body += chunk
                    if len(body) - self._advanced_at >= STALLED_BYTES:
                        self._advanced_at, self.advanced = len(body), monotonic()
        except TimeoutError as error:
            raise Refused(503, "the request arrived too slowly while others waited for memory") from error
        self.arriving = False
        return body

    def stalled(self) -> bool:
        """Whether it waits for a client that sends next to nothing."""
        return self.arriving and monotonic() - self.advanced > STALLED_SECONDS

    def end(self) -> None:
        """Let :meth:`received` raise Refused."""
        self.arriving = False
        self._patience.reschedule(asyncio.get_running_loop().time())


class Uploads:
    """All bodies that arrive or wait to be scored; together they take at most ``max_bytes`` of memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0
        self._all: list[Upload] = []

    @contextmanager
    def upload(self) -> Iterator[Upload]:
        """An upload, whose memory is free again after the block."""
        upload = Upload(self)
        self._all.append(upload)
        try:
            yield upload
        finally:
            self._all.remove(upload)
            self._release(upload)

    def make_room(self, upload: Upload, count: int) -> None:
        """Count ``count`` more bytes as held by ``upload``.

        If that is too much, the upload that has stalled longest makes room. Raises Refused if none has.
        """
        while self.held + count > self.max_bytes:
            stalled = [other for other in self._all if other is not upload and other.stalled()]
            if not stalled:
                raise Refused(503, f"{self.held} bytes of requests wait already; try again later")
            slowest = min(stalled, key=lambda other: other.advanced)
            slowest.end()
            self._release(slowest)
        upload.held += count
        self.held += count

    def _release(self, upload: Upload) -> None:
        self.held -= upload.held
        upload.held = 0
