"""Writes the tables into the generated part of a page, which lies between two marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.bias import rollout_name
from benchmarks.evidence.chains import AGAINST, CHAINS, GROUPS, READINGS
from benchmarks.evidence.measure import ROLLOUTS, SAMPLING_STEPS
from benchmarks.evidence.records import Record, Records
from benchmarks.evidence.tables import (
    VERDICTS,
    bias_table,
    differences_table,
    kinds_table,
    present,
    scores_table,
)
from posttrain.errors import PosttrainError
from posttrain.support.files import write

BEGIN = "<!-- Made by `python -m benchmarks.evidence tables --page docs/evidence.md`. Edit nothing below. -->"
END = "<!-- Made by `python -m benchmarks.evidence tables`: the end. -->"
MAIN = "20"
"""Sampling steps of the comparison that claims are made from."""
MANY = (
    "p: two-sided, by Holm's method for all rows of this table; an interval is of its row alone. It is "
    "for other seeds and other prompts, the one of seeds alone for these prompts. A row of one seed has the "
    "bootstrap's interval, for other prompts."
)


def tables(records: Records) -> Iterator[str]:
    """The lines of all tables that ``records`` suffice for."""
    if arms := present(records):
        yield from _arms(records, arms)
    if chains := [name for name in CHAINS if name in records]:
        yield from _chains(records, chains)


def with_tables(page: str, records: Records) -> str:
    """The text of a page with its generated part made anew. Raises PosttrainError without the two marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise PosttrainError(f"the page needs two lines, in this order:\n{BEGIN}\n{END}")
    before, rest = page.split(BEGIN)
    made = "\n".join(tables(records)).strip()
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def rewrite(page: Path, records: Records) -> None:
    """Make the generated part of the file ``page`` anew. Raises PosttrainError without the two marks."""
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise PosttrainError(f"cannot read {page}: {error.strerror}") from error
    write(page, with_tables(text, records))


def _arms(records: Records, arms: list[str]) -> Iterator[str]:
    pairs = [(name, rival) for name in arms if name != "base" for rival in ARMS[name].against]
    ran = _made(records, arms)
    shown = [f"- `{name}`: {ARMS[name].shows}" for name in arms if name != "base"]
    yield from ("", "### Scores of the arms", "", *shown)
    for steps in map(str, SAMPLING_STEPS):
        yield from ("", f"{steps} sampling steps. {ran}", "", *scores_table(records, arms, steps, VERDICTS))
    yield from ("", f"### Differences of the arms, {MAIN} sampling steps", "", f"{ran} {MANY}", "")
    yield from differences_table(records, pairs, MAIN)
    for steps in map(str, SAMPLING_STEPS):
        if steps != MAIN:
            title = f"### Differences of the arms, {steps} sampling steps"
            yield from ("", title, "", f"{ran} {MANY}", "", *differences_table(records, pairs, steps))
    yield from ("", "### Scores by kind of task")
    for steps in map(str, SAMPLING_STEPS):
        yield from ("", f"{steps} sampling steps; graded / lenient / strict. {ran}", "")
        yield from kinds_table(records, arms, steps)
    unit = (
        "Squared error of the predicted image, sigma^2 times that of the velocity; below the base, changes."
    )
    yield from ("", "### Exposure bias: at states of the data", "", f"{ran} {unit}", "")
    yield from bias_table(records, "data")
    for steps, guidance in ROLLOUTS:
        name, plural = rollout_name(steps, guidance), "" if steps == 1 else "s"
        led = f"after {steps} step{plural} of the model, guidance {guidance:g}"
        yield from ("", f"### Exposure bias: {led}", "", f"{ran} {unit}", "", *bias_table(records, name))
        yield from ("", "The same, less the error before the steps:", "")
        yield from bias_table(records, name, excess=True)


def _chains(records: Records, chains: list[str]) -> Iterator[str]:
    ran, last = _made(records, chains), str(READINGS)
    pairs = [(name, rival) for name in chains for rival in (f"{name} before RL", *AGAINST.get(name, ()))]
    both = {**records, **{f"{name} before RL": _before_rl(records[name], last) for name in chains}}
    yield from ("", "### Chains", "", ran, "")
    yield from scores_table(records, chains, last, (*VERDICTS, "distance"))
    for score, title in (("shapes", "graded score"), ("distance", "distance within a prompt")):
        yield from ("", f"### Differences of the chains: {title}", "", f"{ran} {MANY}", "")
        lines = list(differences_table(both, pairs, last, score))
        yield from (lines[0].replace("graded", title.partition(" ")[0]), *lines[1:])
    yield from ("", "### Chains on the way", "", ran, "")
    yield "| chain | step of RL | forward-equivalents | reward | graded | lenient | strict | distance |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in chains:
        for number in range(READINGS + 1):
            readings = [record["readings"][number] for record in records[name]]
            scores = [record["evaluations"][str(number)] for record in records[name]]
            reward = f"{fmean(r['reward'] for r in readings):.3f}" if number else ""
            cost = f"{fmean(r['forward_equivalents'] for r in readings) / 1000:.0f}k"
            means = [f"{fmean(fmean(s[key]) for s in scores):.3f}" for key in (*VERDICTS, "distance")]
            cells = [f"`{name}`", str(readings[0]["step"]), cost, reward, *means]
            yield f"| {' | '.join(cells)} |"


def _before_rl(records: Sequence[Record], key: str) -> list[Record]:
    """``records`` whose evaluation ``key`` is the one before RL."""
    return [{**record, "evaluations": {key: record["evaluations"]["0"]}} for record in records]


def _made(records: Records, names: list[str]) -> str:
    """When and by which command the records of ``names`` were made, as a sentence."""
    of = [record for name in names for record in records[name]]
    first, last = min(r["date"] for r in of), max(r["date"] for r in of)
    when = first if first == last else f"{first} to {last}"
    devices = ", ".join(sorted({r["device"] for r in of}))
    with_seeds: dict[str, list[str]] = {}
    for name in names:
        seeds = ",".join(str(seed) for seed in sorted(r["seed"] for r in records[name]))
        with_seeds.setdefault(seeds, []).append(name)
    commands = [
        f"`python -m benchmarks.evidence run --only {_short(members)} --seeds {seeds}`"
        for seeds, members in with_seeds.items()
    ]
    return f"{when}, {devices}, {' and '.join(commands)}."


def _short(names: list[str]) -> str:
    """The name of the group that ``names`` are, or else all of them."""
    groups = (group for group, members in GROUPS.items() if {*members} == {*names})
    return next(groups, ",".join(names))
