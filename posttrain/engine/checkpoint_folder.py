"""Keeps a stage's checkpoints: writes them, finds the newest whole one, and removes what is not kept."""

from __future__ import annotations

import math
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from posttrain.engine.background import Background
from posttrain.engine.checkpoint import load, part_names, verified
from posttrain.engine.manifest import Damage
from posttrain.engine.state import State, check_fit, restore, state_of
from posttrain.engine.writing import PartMissing, Writing, has_room
from posttrain.errors import PosttrainError
from posttrain.parallel.strategy import Strategy
from posttrain.policy.policy import Policy
from posttrain.support.device import available_memory
from posttrain.support.files import clear_up, remove
from posttrain.support.write_errors import writing

GRACE_SECONDS = 10
"""How long the main process waits for others' parts of a checkpoint if an error ends the stage."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest, and those that have a reason of their own."""

    last: int
    """How many of the newest stay, 1 or more."""
    every: int | None = None
    """Those of steps that are multiples of this stay as well."""
    steps: frozenset[int | None] = frozenset()
    """Those of these steps stay as well."""

    def stay(self, steps: list[int]) -> set[int]:
        """Those of ``steps``, in rising order, whose checkpoints stay."""
        return {
            step
            for i, step in enumerate(reversed(steps))
            if i < self.last or (self.every is not None and step % self.every == 0) or step in self.steps
        }


@dataclass(frozen=True)
class Restored:
    """What was restored from a checkpoint."""

    step: int
    """Optimizer steps that it holds."""
    extra: dict[str, Any]


@dataclass(frozen=True)
class _Choice:
    """The checkpoint that all processes restore, as the main one chose it."""

    name: str | None = None
    error: str | None = None


class CheckpointFolder:
    """The checkpoints of one stage, in a folder of their own.

    Every process makes one and calls its methods in the same order. Each writes its own part of a state in
    the background, from a copy in the CPU's memory. The main one writes what all hold, checks and chooses,
    and all follow it. As a context manager it waits at the end for what is being written.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        strategy: Strategy,
        fingerprint: str,
        tell: Callable[[str], None],
        former: Sequence[str] = (),
    ) -> None:
        """``fingerprint`` says of which run and stage the checkpoints are; others are not restored, but for
        those of a ``former`` fingerprint.

        The main process calls ``tell`` with a sentence on each checkpoint that it could not use; any process
        on one that could not be written while another error ends the stage.
        """
        self.folder, self.policy, self.strategy = folder, policy, strategy
        self.fingerprint, self.tell, self.world = fingerprint, tell, strategy.world
        self.former = former
        self._background = Background()
        self._writing: Writing | None = None
        self._latest: int | None = None

    def save(self, step: int, extra: dict[str, Any], retention: Retention) -> None:
        """Write the state after ``step`` steps, unless there is a checkpoint of that step.

        Then the checkpoints are removed that do not stay by ``retention``, but never this one. Returns when
        training may go on; files may still be written then, see :meth:`check` and :meth:`wait`.
        """
        is_there = step == self._latest or step in map(step_of, saved(self.folder))
        mark = self.world.broadcast(None if is_there else secrets.token_hex(4))
        if mark is None:
            if self.world.is_main and step != self._latest:  # a kill may have come before the removal
                self._remove_others(step, retention)
            return
        self.wait()  # so that there is one copy of a state at a time
        state, self._latest = state_of(step, self.policy, self.strategy, extra), step
        room = available_memory(torch.device("cpu"))
        sizes = self.world.gather_objects((state.size, socket.gethostname(), room))
        writers = [rank for rank, (size, *_) in enumerate(sizes) if size]
        files = dict(zip(writers, part_names(len(writers)), strict=True))
        self._writing = Writing(self.folder / f"step-{step:08d}", mark, files, self.fingerprint)
        fits = has_room(sizes)
        if fits:
            state = state.copied()
        if self.world.is_main:
            self._background.start(partial(self._write, self._writing, state, retention))
        elif self.world.rank in files:
            self._background.start(partial(self._writing.write_part, self.world.rank, state))
        if not fits:
            self.wait()

    def check(self) -> None:
        """Raise the error of the last :meth:`save` if this process has met one by now. Does not wait."""
        if (error := self._background.failure()) is not None:
            raise error

    def wait(self) -> None:
        """Wait until what was saved is on the disk; raise its error in every process."""
        main = self.world.is_main
        error = self._background.failure() if main else self._background.wait()
        words = [w for w in self.world.gather_objects(str(error) if error else None) if w is not None]
        if main:
            late = self._ended(0 if words else math.inf)
            if late is not None and not (words and isinstance(late, PartMissing)):
                error, words = late, [str(late)]
        words = self.world.broadcast(words)
        if error is not None and str(error) == words[0]:
            raise error
        if words:  # the first process's: those of others may come of it
            raise PosttrainError(words[0])

    def _ended(self, seconds: float) -> BaseException | None:
        """The error of what is being written, once it has ended; others' parts are waited for so long."""
        if self._writing is not None:
            self._writing.until = time.monotonic() + seconds
        return self._background.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif (error := self._ended(GRACE_SECONDS)) is not None:
            self.tell(str(error))  # and the block's own error goes on

    def restore(self, until: int | None = None) -> Restored | None:
        """Restore the newest whole checkpoint, of step ``until`` at the latest; None if there is none at all.

        Newer ones that cannot be used are set aside: their folder gets another name. Raises PosttrainError
        if there are checkpoints and none can be used; then they stay as they are.
        """
        self.wait()
        choice = self.world.broadcast(self._choose(until) if self.world.is_main else _Choice())
        if choice.error is not None:
            raise PosttrainError(choice.error)
        if choice.name is None:
            return None
        state = load(self.folder / choice.name)
        restore(state, self.policy, self.strategy)
        self._latest = None
        return Restored(state.step, state.extra)

    def drop_after(self, step: int) -> None:
        """Remove all checkpoints of later steps than ``step``."""
        if self.world.is_main:
            for path in saved(self.folder):
                if step_of(path) > step:
                    remove(path)

    def _write(self, writing: Writing, state: State, retention: Retention) -> None:
        writing.write_rest(state)
        self._remove_others(state.step, retention)

    def _remove_others(self, step: int, retention: Retention) -> None:
        """Remove what does not stay beside that of ``step``, and what killed processes left half removed."""
        paths = {step_of(path): path for path in saved(self.folder)}
        for old in paths.keys() - retention.stay(list(paths)) - {step}:
            remove(paths[old])
        clear_up(self.folder)

    def _choose(self, until: int | None) -> _Choice:
        """The newest checkpoint that can be used, after those that cannot be were set aside."""
        useless: list[tuple[Path, Damage]] = []
        for path in reversed(saved(self.folder)):
            if until is not None and step_of(path) > until:
                continue
            try:
                state = verified(path, self.fingerprint, *self.former)
                if state.step != step_of(path):
                    raise Damage(f"it is of step {state.step}")
                check_fit(state, self.policy, self.strategy)
            except Damage as damage:
                useless.append((path, damage))
                continue
            try:
                for one in useless:
                    self.tell(_set_aside(*one))
            except PosttrainError as error:
                return _Choice(error=str(error))
            return _Choice(path.name)
        if not useless:
            return _Choice()
        reasons = "; ".join(f"{path.name}: {damage}" for path, damage in useless)
        return _Choice(
            error=f"no checkpoint in {str(self.folder)!r} can be used: {reasons}. Put back a copy of one, or "
            f"begin the stage anew: posttrain run RECIPE --fresh {self.folder.parent.name}"
        )


def saved(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, whole or not, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"step-\d{8,}", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def _set_aside(checkpoint: Path, damage: Damage) -> str:
    """Give a checkpoint a name by which it is none, and return a sentence that says so and why."""
    target = checkpoint.with_name(f"{checkpoint.name}.{damage.suffix}")
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}.{damage.suffix}-{number}")
    with writing(checkpoint):
        checkpoint.rename(target)
    return f"the checkpoint {str(checkpoint)!r} is passed over: {damage}. It is now {target.name!r}"
