"""Runs a served reward in a process of its own, so that a reward that hangs or dies leaves the server alive.

The server ends the process if scores take too long. The process ends with the server, also if that is killed.
Prompts, rows and scores go through a pipe; images through a socket, which copies them less often.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import NotFinite, PosttrainError, RewardError
from posttrain.reward import Reward, Scores, checked
from posttrain.scoring.server.answers import answer, scores_of
from posttrain.support.device import set_tf32
from posttrain.support.user_errors import with_lines

ENDING_SECONDS = 1.0


class RewardDied(RewardError):
    """The process of the reward has ended, or had to be ended: it must be started again."""


class Worker:
    """A reward in a process of its own. Calling it scores images there; it takes one call at a time."""

    def __init__(self, reward: Reward, device: torch.device, seconds: float) -> None:
        self.reward, self.device, self.seconds = reward, device, seconds
        self._process: BaseProcess | None = None
        self._late = self._closed = False
        self._call: object | None = None
        """Stands for the call whose scores are awaited."""
        self._ending = threading.Lock()

    def start(self) -> None:
        """Start the process and load the reward in it. Raises RewardError if that fails."""
        if self._process is not None:
            self._pipe.close()
            self._socket.close()
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA and threads
        self._pipe, far_pipe = context.Pipe()
        self._socket, far_socket = socket.socketpair()
        work = (far_pipe, far_socket, self.reward, self.device)
        process = context.Process(target=_work, args=work, name=f"reward {self.reward.label}")
        process.start()
        self._process, self._late = process, False
        if self._closed:
            self._kill()
        for far_end in (far_pipe, far_socket):
            far_end.close()  # so that the pipe breaks when the process ends
        self._result()

    def __call__(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
        """The scores of ``images``. Raises RewardError: NotFinite if one is not finite, RewardDied if there
        will be no more scores."""
        self._call = call = object()
        limit = threading.Timer(self.seconds, self._kill_late, [call])
        limit.start()
        try:
            self._pipe.send((tuple(images.shape), list(prompts), list(rows)))
            self._socket.sendall(images.contiguous().numpy().data)
            return scores_of(self._result(), len(prompts))
        except OSError as error:
            raise self._died() from error
        finally:
            limit.cancel()
            with self._ending:
                self._call = None

    def close(self) -> None:
        """End the process for good, whatever it is doing."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _kill_late(self, call: object) -> None:
        with self._ending:
            if self._call is not call:
                return  # its scores arrived in the moment that its time was up
            self._late = True
            if self._process is not None:
                self._process.kill()

    def _result(self) -> Any:
        """What the process sends next. Raises RewardError if that is an error: RewardDied if it ends."""
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind == "died":
            raise self._died(value)
        if kind == "not finite":
            raise NotFinite(*value)
        if kind == "error":
            raise RewardError(value)
        return value

    def _died(self, reason: str = "") -> RewardDied:
        """End the process, and say why there are no scores."""
        assert self._process is not None
        self._process.join(ENDING_SECONDS)  # its pipe breaks a moment before it has ended by itself
        self._kill()
        code = self._process.exitcode or 0
        if self._late:
            reason = f"no scores within {self.seconds:g} s"
        elif not reason and code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            reason = f"its process was killed by {signal.Signals(-code).name}{hint}"
        elif not reason:
            reason = f"its process ended with exit code {code}"
        return RewardDied(f"the reward {self.reward.label!r} has died: {reason}")


def _work(pipe: Connection, pixels: socket.socket, reward: Reward, device: torch.device) -> None:
    """Load ``reward`` and score what comes through ``pipe``, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches this process; the server ends it
    threading.Thread(target=_end_with_server, daemon=True).start()
    set_tf32(False)
    try:
        score = checked(reward.label, reward.load(device))
    except Exception as error:
        pipe.send(("error", str(error) if isinstance(error, PosttrainError) else with_lines(error)))
        return
    pipe.send(("loaded", None))
    while True:
        try:
            shape, prompts, rows = pipe.recv()
            images = _received(pixels, shape)
        except EOFError:
            return
        pipe.send(_scored(score, images, prompts, rows, device))


def _received(pixels: socket.socket, shape: Sequence[int]) -> Tensor:
    images = torch.empty(shape)
    rest = images.numpy().data.cast("B")
    while rest:
        if not (count := pixels.recv_into(rest)):
            raise EOFError
        rest = rest[count:]
    return images


def _scored(score, images, prompts, rows, device: torch.device) -> tuple[str, Any]:
    try:
        return "scores", answer(score(images, prompts, rows))
    except NotFinite as error:
        return "not finite", (str(error), [*error.positions])
    except RewardError as error:
        reason = str(error)
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # after some errors CUDA cannot be used by this process any more
    except RuntimeError as error:
        return "died", f"{reason} ({error})"
    return "error", reason


def _end_with_server() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
