"""Runs tests against mutants: in forked children of a process that has collected the tests already.

A change inside a function is made by giving the live function other code; only the tests that call the
function are run. A change that takes effect at import needs a process that has not imported the module yet.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from children import KILLED, NOT_POSSIBLE, SURVIVED, forked, outcomes
from live import functions_of, live_functions, nested
from operators import Module, Mutant

PYTEST = ["-q", "-s", "--disable-warnings", "-p", "no:cacheprovider", "-p", "no:xdist"]


@dataclass
class Target:
    """A module and the test files that must kill its mutants."""

    name: str
    tests: list[str]
    survivors: list[dict[str, str]]
    path: str = ""
    outcomes: dict[int, int] = field(default_factory=dict)
    """Number of the mutant -> how it ended."""


def settle() -> None:
    """The same examples of property tests in every run, not shrunk where they fail."""
    import torch
    from hypothesis import Phase, settings

    torch.set_num_threads(1)
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutation", database=None, derandomize=True, deadline=None, phases=phases)
    settings.load_profile("mutation")


class Collected:
    """A pytest plugin: runs the collected tests once, then once more for each mutant inside a function."""

    def __init__(self, targets: list[Target], every: int, jobs: int, report: str) -> None:
        self.targets, self.every, self.jobs, self.report = targets, every, jobs, report
        self.seconds: dict[str, float] = {}
        self.called: dict[str, set[tuple[str, str, int]]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise pytest.UsageError("the tests could not be collected")
        for target in self.targets:
            spec = importlib.util.find_spec(target.name)
            assert spec is not None, f"no module {target.name}"
            target.path = str(spec.origin)
        self.baseline(session.items)
        items = sorted(session.items, key=lambda item: self.seconds[item.nodeid])
        items = [item for item in items if item.nodeid in self.called]
        self.functions, self.caches = live_functions({t.path for t in self.targets})
        later = {t.name: list(self.fast(t, items)) for t in self.targets}
        result = {
            t.name: {"path": t.path, "outcomes": t.outcomes, "later": later[t.name]} for t in self.targets
        }
        Path(self.report).write_text(
            json.dumps({"seconds": self.seconds, "targets": result}), encoding="utf-8"
        )
        return True

    def baseline(self, items: list[pytest.Item]) -> None:
        """Run every test once; note its seconds and the functions it calls."""
        files = {target.path for target in self.targets}
        calls: set[tuple[str, str, int]] = set()

        def note(frame, event, _):
            code = frame.f_code
            if event == "call" and code.co_filename in files:
                calls.add((code.co_filename, code.co_qualname, code.co_firstlineno))

        for i, item in enumerate(items):
            calls.clear()
            began = time.monotonic()
            threading.setprofile(note)
            sys.setprofile(note)
            try:
                passed, skipped = ran(item, items[i + 1] if i + 1 < len(items) else None)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
            self.seconds[item.nodeid] = time.monotonic() - began
            if not passed:
                raise pytest.UsageError(f"{item.nodeid} fails without any change")
            if not skipped:
                self.called[item.nodeid] = set(calls)

    def fast(self, target: Target, items: list[pytest.Item]) -> Iterator[int]:
        """Run the mutants inside functions; yield the numbers of those that need a new import."""
        module = Module(target.path)
        outermost = {key: outer for outer, code in functions_of(module.compiled()) for key in nested(code)}
        files = {str(Path(test).resolve()) for test in target.tests}
        own = [item for item in items if str(item.path.resolve()) in files]
        callers: dict[tuple[str, int], list[pytest.Item]] = {}
        for item in own:
            keys = {outermost.get(c[1:]) for c in self.called[item.nodeid] if c[0] == target.path}
            for key in keys - {None}:
                callers.setdefault(key, []).append(item)
        jobs = [(-1, functools.partial(self.attempt, module, None, own), 1e5)]
        for number, mutant in list(enumerate(module.mutants))[:: self.every]:
            tests = callers.get(mutant.key, [])
            if mutant.key is None:
                yield number
            elif not tests:
                target.outcomes[number] = SURVIVED
            else:
                allowed = 5 + 10 * sum(self.seconds[item.nodeid] for item in tests)
                jobs.append((number, functools.partial(self.attempt, module, mutant, tests), allowed))
        for number, code in outcomes(jobs, self.jobs):
            if number == -1 and code != SURVIVED:
                raise pytest.UsageError(f"the tests of {target.name} fail when they are run a second time")
            if code == NOT_POSSIBLE:
                yield number
            elif number >= 0:
                target.outcomes[number] = code

    def attempt(self, module: Module, mutant: Mutant | None, items: list[pytest.Item]) -> int:
        for cache in self.caches:
            cache.cache_clear()
        if mutant is not None:
            code = dict(functions_of(module.compiled(mutant)))[mutant.key]
            for function in self.functions.get((module.path, *mutant.key), []):
                if function.__code__.co_freevars != code.co_freevars:
                    return NOT_POSSIBLE
                function.__code__ = code
        folder = tempfile.mkdtemp()
        items[0].config._tmp_path_factory._basetemp = Path(folder)
        try:
            for item, after in zip(items, [*items[1:], None], strict=True):
                if not ran(item, after)[0]:
                    return KILLED
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return SURVIVED


def ran(item: pytest.Item, after: pytest.Item | None) -> tuple[bool, bool]:
    """Run one test; whether it passed, and whether it was skipped."""
    from _pytest.runner import runtestprotocol

    reports = runtestprotocol(item, nextitem=after, log=False)
    return not any(r.failed for r in reports), any(r.skipped for r in reports)


class FastestFirst:
    """A pytest plugin: sorts tests by the seconds they took before."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 1e9))


def imported(target: Target, module: Module, mutant: Mutant | None, seconds: dict[str, float]) -> int:
    """Import the changed module and run the target's tests, in a process that has imported nothing of it."""
    plain = SourceFileLoader.get_code

    def get_code(self, name):
        return module.compiled(mutant) if self.path == module.path else plain(self, name)

    SourceFileLoader.get_code = get_code
    settle()
    folder = tempfile.mkdtemp()
    try:
        result = pytest.main([*PYTEST, "-x", f"--basetemp={folder}", *target.tests], [FastestFirst(seconds)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return KILLED if result else SURVIVED


def run(targets: list[Target], every: int, jobs: int) -> None:
    """Fill in how every mutant of ``targets`` ended."""
    tests = sorted({test for target in targets for test in target.tests})
    with tempfile.NamedTemporaryFile() as report:

        def collect() -> int:
            settle()
            folder = tempfile.mkdtemp()
            plugin = Collected(targets, every, jobs, report.name)
            code = pytest.main([*PYTEST, f"--basetemp={folder}", *tests], [plugin])
            shutil.rmtree(folder, ignore_errors=True)
            return int(code)

        if os.waitstatus_to_exitcode(os.waitpid(forked(collect, silent=False), 0)[1]):
            raise SystemExit("nothing was measured")
        found = json.loads(Path(report.name).read_text(encoding="utf-8"))
    for target in targets:
        part = found["targets"][target.name]
        target.path = part["path"]
        target.outcomes = {int(number): code for number, code in part["outcomes"].items()}
        module, seconds = Module(target.path), found["seconds"]
        allowed = 60 + 10 * sum(seconds.values())
        work = [(-1, functools.partial(imported, target, module, None, seconds), allowed)]
        for n in part["later"]:
            work.append((n, functools.partial(imported, target, module, module.mutants[n], seconds), allowed))
        for number, code in outcomes(work if len(work) > 1 else [], jobs):
            if number == -1 and code != SURVIVED:
                raise SystemExit(f"the tests of {target.name} fail in a process of their own")
            if number >= 0:
                target.outcomes[number] = code
