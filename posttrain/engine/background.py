"""Runs one job at a time beside training, and hands its error to who asks next."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """A thread for one job at a time. A process that ends does not wait for it."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the background. The one before must have been waited for."""
        assert self._thread is None, "one job at a time"

        def work() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=work, daemon=True)
        self._thread.start()

    def failure(self) -> BaseException | None:
        """The error of the job if it has ended with one, once; else None. Does not wait."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread, error, self._error = None, self._error, None
        return error

    def wait(self) -> BaseException | None:
        """Wait until the job has ended; returns as :meth:`failure`."""
        if self._thread is not None:
            self._thread.join()
        return self.failure()
