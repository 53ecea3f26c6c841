"""Measures how many single changes of the code the tests notice.

    python tests/mutation                      every target
    python tests/mutation flow soar            some, by module name or its end
    python tests/mutation flow --survivors     also the accepted survivors, with why they change nothing
    python tests/mutation flow --list          the changes that would be made; runs nothing
    python tests/mutation --every 10           every tenth change: a quick look

``targets/*.toml`` name each module, the test files that must notice its changes, and the survivors: changes
that no test can notice because they change nothing that matters, each by its function, the statement before
and after, and why. Exit status 1 where fewer than 95 % of a module's changes are noticed or accepted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST = 95.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/mutation", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="modules, or ends of their names; all by default")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    parser.add_argument("--every", type=int, default=1, help="make only every N-th change")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--survivors", action="store_true", help="print accepted survivors too")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.dont_write_bytecode = True
    targets, preload = read(options.targets)
    if options.list:
        return listed(targets)
    for name in preload:
        importlib.import_module(name)
    import execution

    began = time.monotonic()
    targets = [execution.Target(t["module"], t["tests"], t.get("survivor", [])) for t in targets]
    execution.run(targets, options.every, options.jobs)
    code = reported(targets, options)
    print(f"{time.monotonic() - began:.0f} s")
    return code


def read(names: list[str]) -> tuple[list[dict], list[str]]:
    """The targets that ``names`` mean, and the libraries to import before all else."""
    tables = [
        tomllib.loads(p.read_text()) for p in sorted((Path(__file__).parent / "targets").glob("*.toml"))
    ]
    targets = [target for table in tables for target in table.get("target", [])]
    known = [target["module"] for target in targets]
    for name in names:
        if not any(f".{module}".endswith(f".{name}") for module in known):
            raise SystemExit(f"no target {name!r}; there are {', '.join(known)}")
    chosen = [t for t in targets if not names or any(f".{t['module']}".endswith(f".{n}") for n in names)]
    return chosen, sorted({name for table in tables for name in table.get("preload", [])})


def listed(targets: list[dict]) -> int:
    from operators import Module

    for target in targets:
        spec = importlib.util.find_spec(target["module"])
        for mutant in Module(str(spec.origin)).mutants:
            print(f"{target['module']}:{mutant.line} {mutant.function}: {mutant.before} -> {mutant.after}")
    return 0


def reported(targets: list, options: argparse.Namespace) -> int:
    from children import SURVIVED, TOO_LONG
    from operators import Module

    rows, below = [], False
    for target in targets:
        mutants = Module(target.path).mutants
        whys = {(s["function"], s["before"], s["after"]): s["why"] for s in target.survivors}
        accepted, open_, seen = 0, 0, set()
        for number in sorted(target.outcomes):
            m = mutants[number]
            key = (m.function, m.before, m.after)
            if target.outcomes[number] != SURVIVED:
                continue
            seen.add(key)
            accepted, open_ = accepted + (key in whys), open_ + (key not in whys)
            if key not in whys or options.survivors:
                where = f"{os.path.relpath(target.path)}:{m.line} {m.function or '(module)'}"
                print(f"{where}\n    {m.before}\n -> {m.after}")
                print(f"    because: {whys[key]}" if key in whys else "", end="\n" if key in whys else "")
        for key in [key for key in whys if key not in seen and options.every == 1]:
            print(f"{target.name}: listed as a survivor, but is none: {key[0]}: {key[1]} -> {key[2]}")
        count = len(target.outcomes)
        score = 100 * (1 - open_ / count) if count else 100.0
        below |= score < LEAST
        late = sum(outcome == TOO_LONG for outcome in target.outcomes.values())
        rows.append((target.name, count, count - accepted - open_, late, accepted, open_, score))
    width = max(len(row[0]) for row in rows)
    print(f"{'module':{width}} mutants killed (too long) accepted open  score")
    for name, count, killed, late, accepted, open_, score in rows:
        print(f"{name:{width}} {count:7} {killed:6} {late:10} {accepted:8} {open_:4} {score:5.1f}%")
    return int(below)


if __name__ == "__main__":
    sys.exit(main())
