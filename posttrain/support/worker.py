"""A thread that makes calls in order, and for which the end of the program does not wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One thread. For those of Python's executors the end of the program waits, also if one hangs."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        """Make ``call`` after those submitted before; the future has its result, or its exception."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: call(*arguments, **named)))
        return future

    def close(self, seconds: float) -> None:
        """Cancel the calls that have not begun; wait up to ``seconds`` for the one that has."""
        self._closed = True
        self._calls.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, future, call  # what a call holds must not stay until the next one
