"""Trains and measures the arms of the evidence, and makes its tables. A stopped call goes on.

    python -m benchmarks.evidence run --workers 2                 # every arm, five seeds
    python -m benchmarks.evidence run --only soar,sft --seeds 0-2
    python -m benchmarks.evidence tables

``run`` starts one process for each arm and seed, ``--workers`` at a time with ``--threads`` threads each. A
record of each is kept in ``--records``; what has a record is not run again. ``--steps`` and ``--samples``
shorten all of it for a trial, which needs a folder of records of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.measure import SAMPLING_STEPS, measured
from benchmarks.evidence.tables import arms_table, bias_table, kinds_table, read

ROOT = Path(__file__).parent.parent.parent
RECORDS = Path(__file__).parent / "records"


def seeds(text: str) -> list[int]:
    """``0-4`` or ``0,3`` as numbers."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(x) for x in text.split(",")]


def run(arguments: argparse.Namespace) -> int:
    """Run what has no record yet; the number of those that failed."""
    names = arguments.only.split(",") if arguments.only else ["base", *ARMS]
    if unknown := set(names) - {"base", *ARMS}:
        raise SystemExit(f"no arm {', '.join(sorted(unknown))}: one of base, {', '.join(ARMS)}")
    # one seed of every arm before the next, so that a stopped series compares all arms
    jobs = [(name, seed) for seed in arguments.seeds for name in names if name != "base" or seed == 0]
    shared = ["--runs", str(arguments.runs), "--records", str(arguments.records)]
    for option in ("steps", "samples"):
        if (value := getattr(arguments, option)) is not None:
            shared += [f"--{option}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}

    def job(name: str, seed: int) -> bool:
        if (arguments.records / f"{name}-{seed}.json").exists():
            return True
        log = arguments.runs / f"{name}-{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.evidence", "one", name, str(seed), *shared]
        with log.open("a", encoding="utf-8") as out:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        print(f"{name}-{seed}: {'measured' if done.returncode == 0 else f'failed, see {log}'}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(arguments.workers) as pool:
        return [*pool.map(lambda each: job(*each), jobs)].count(False)


def tables(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    records = read(arguments.records)
    for steps in SAMPLING_STEPS:
        print(f"\n### {steps} sampling steps\n", *arms_table(records, steps), sep="\n")
    print("\n### By kind of task, 20 sampling steps\n", *kinds_table(records, 20), sep="\n")
    for rollout in (1, 5):
        title = f"### Error of the predicted image, data's states to the model's, after {rollout} steps"
        print(f"\n{title}\n", *bias_table(records, rollout), sep="\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "one", "tables"):
        command = commands.add_parser(name)
        command.add_argument("--records", type=lambda p: Path(p).absolute(), default=RECORDS)
        if name == "tables":
            continue
        command.add_argument("--runs", type=lambda p: Path(p).absolute(), default=ROOT / "runs" / "evidence")
        command.add_argument("--steps", type=int, help="optimizer steps of every arm, for a trial")
        command.add_argument("--samples", type=int, help="samples of every evaluation, for a trial")
        if name == "one":
            command.add_argument("arm")
            command.add_argument("seed", type=int)
        else:
            command.add_argument("--only", help="arms, separated by commas")
            command.add_argument("--seeds", type=seeds, default=list(range(5)))
            command.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
            command.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "one":
        at = (arguments.arm, arguments.seed, arguments.runs, arguments.records)
        measured(*at, steps=arguments.steps, samples=arguments.samples)
        return 0
    return {"run": run, "tables": tables}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
