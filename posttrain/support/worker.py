"""Threads that make calls, and for which the end of the program does not wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
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


def in_threads(name: str, count: int, call: Callable[..., T], *arguments: Iterable[Any]) -> list[Future[T]]:
    """Make ``call`` with the first of each of ``arguments``, the second, and so on, as ``map`` does, in up to
    ``count`` threads. The futures have the results, or the exceptions, in that order."""
    calls: list[tuple[Future[T], tuple[Any, ...]]] = [
        (Future(), given) for given in zip(*arguments, strict=True)
    ]
    waiting = iter(calls)

    def work() -> None:
        for future, given in waiting:  # the threads share it, and each call goes to one of them
            try:
                result = call(*given)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    for _ in range(min(count, len(calls))):
        threading.Thread(target=work, name=name, daemon=True).start()
    return [future for future, _ in calls]
