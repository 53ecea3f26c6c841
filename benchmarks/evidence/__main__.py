"""Trains and measures the arms and the chains of the evidence, and makes its tables. A stopped call goes on.

    python -m benchmarks.evidence run --workers 2                 # every arm, five seeds; every chain, three
    python -m benchmarks.evidence run --only soar,sft --seeds 0-2
    python -m benchmarks.evidence run --only chains
    python -m benchmarks.evidence tables                          # printed
    python -m benchmarks.evidence tables --page docs/evidence.md  # into the page's generated part

``run`` starts one process for each arm or chain and seed, ``--workers`` at a time with ``--threads`` threads
each. A record of each is kept in ``--records``; what has a record is not run again, and a record by other
settings is refused. ``--steps`` and ``--samples`` shorten all of it for a trial, which needs folders of its
own. How long it takes is in :mod:`benchmarks.evidence.chains`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.evidence.chains import CHAINS, GROUPS, chain_identity, measured_chain
from benchmarks.evidence.identity import is_made
from benchmarks.evidence.measure import arm_identity, measured
from benchmarks.evidence.page import rewrite, tables
from benchmarks.evidence.records import read
from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent.parent
RECORDS = Path(__file__).parent / "records"
SEEDS = {"arms": 5, "chains": 3}


def seeds(text: str) -> list[int]:
    """``0-4`` or ``0,3`` as numbers."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(x) for x in text.split(",")]


def jobs(only: str | None, seeds: Sequence[int] | None) -> list[tuple[str, int]]:
    """Arms and chains with their seeds, in the order of running. Raises SystemExit for an unknown name."""
    given = only.split(",") if only else [*GROUPS]
    names = [name for each in given for name in GROUPS.get(each, [each])]
    of = {name: group for group, members in GROUPS.items() for name in members}
    if unknown := set(names) - {*of}:
        raise SystemExit(f"no {', '.join(sorted(unknown))}: one of {', '.join([*GROUPS, *of])}")
    numbers = {name: range(SEEDS[of[name]]) if seeds is None else seeds for name in names}
    # one seed of every arm before the next, so that a stopped series compares all arms
    order = sorted({seed for of_name in numbers.values() for seed in of_name})
    return [(name, seed) for seed in order for name in numbers if seed in numbers[name]]


def run(arguments: argparse.Namespace) -> int:
    """Run what has no record yet; the number of those that failed. Raises PosttrainError, before any runs,
    for a record by other settings."""
    trial = arguments.steps, arguments.samples
    identities = {
        name: (chain_identity if name in CHAINS else arm_identity)(name, *trial)
        for name, _ in jobs(arguments.only, arguments.seeds)
    }
    due = [
        (name, seed)
        for name, seed in jobs(arguments.only, arguments.seeds)
        if not is_made(arguments.records / f"{name}-{seed}.json", identities[name])
    ]
    shared = ["--runs", str(arguments.runs), "--records", str(arguments.records)]
    for option in ("steps", "samples"):
        if (value := getattr(arguments, option)) is not None:
            shared += [f"--{option}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}

    def job(name: str, seed: int) -> bool:
        log = arguments.runs / f"{name}-{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.evidence", "one", name, str(seed), *shared]
        with log.open("a", encoding="utf-8") as out:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        print(f"{name}-{seed}: {'measured' if done.returncode == 0 else f'failed, see {log}'}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(arguments.workers) as pool:
        return [*pool.map(lambda each: job(*each), due)].count(False)


def one(arguments: argparse.Namespace) -> int:
    """Make one record."""
    make = measured_chain if arguments.arm in CHAINS else measured
    at = (arguments.arm, arguments.seed, arguments.runs, arguments.records)
    make(*at, steps=arguments.steps, samples=arguments.samples)
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print the tables, or write them into a page."""
    records = read(arguments.records)
    if arguments.page is None:
        print(*tables(records), sep="\n")
    else:
        rewrite(arguments.page, records)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("run", run), ("one", one), ("tables", show)):
        command = commands.add_parser(name, help=(does.__doc__ or "").splitlines()[0])
        command.set_defaults(does=does)
        command.add_argument("--records", type=lambda p: Path(p).absolute(), default=RECORDS)
        if name == "tables":
            command.add_argument("--page", type=Path, help="a page with the two marks")
            continue
        command.add_argument("--runs", type=lambda p: Path(p).absolute(), default=ROOT / "runs" / "evidence")
        command.add_argument("--steps", type=int, help="optimizer steps of every stage, for a trial")
        command.add_argument("--samples", type=int, help="prompts of every evaluation, for a trial")
        if name == "one":
            command.add_argument("arm")
            command.add_argument("seed", type=int)
        else:
            command.add_argument("--only", help="names, or arms or chains, separated by commas")
            command.add_argument("--seeds", type=seeds, help="as 0-4 or 0,3 (default: five, of chains three)")
            command.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
            command.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    try:
        return arguments.does(arguments)
    except PosttrainError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
