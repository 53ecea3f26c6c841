"""A table of measured figures stands in a section with the date of the measurement and the command that makes it."""

import re

import pytest
from pages import PAGES, name_of, sections

UNIT = r"(?:ms|s|min|minutes|h|hours|MB|GB|TB|%|TFLOP|TFLOP/s|images/s|samples/s|rows/s|/s|GPU-hours)"
FIGURE = re.compile(rf"\d[\d.,]*k? ?{UNIT}(?![\w/])|\d \[[-+]?\d")
"""A number with a unit, or with an interval."""
UNITS = re.compile(rf"(?<!\w)(?:{UNIT}|MFU|measured|ratio|agreement|loss)(?![\w/])")
"""What the head of a column of figures has."""
FEW = 3
"""So many figures make a table one of measurements."""
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
COMMAND = re.compile(
    r"(?:`|^)(?:\w+=\S+ |time )*(?:posttrain|python|pytest|make|\.venv/bin/python|benchmarks/\w+\.sh)(?: |`)",
    re.M,
)
SETTINGS = ("field", "setting", "bound", "option")
"""First heads of tables whose figures are defaults and bounds."""
NOT_MEASURED = {
    ("docs/rewards.md", "Rewards"): "sizes of published files, ranges and bounds of scores",
    (
        "docs/performance.md",
        "Counts against known figures",
    ): "counted by tests/test_plan.py in each of its runs",
    (
        "docs/algorithm-soar.md",
        "Where published code was not followed",
    ): "properties of published code, found when it was read and its numbers were recorded",
}
"""Page and section whose table has figures that no command measured, and what they are."""


def tables(text):
    """The rows of cells of each table of ``text`` but those of settings and those that name a source, without code."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for before, table in re.findall(r"((?:^[^|\n].*\n)*\n?)((?:^\|.*\n?)+)", plain, re.M):
        rows = [
            [cell.strip() for cell in re.sub(r"`[^`]*`", "", row).strip()[1:-1].split("|")]
            for row in table.splitlines()
        ]
        if table.strip("| ").split(" |")[0].strip("`") not in SETTINGS and "](http" not in before + table:
            yield rows


def figures(rows):
    """How many figures a table has."""
    head, *rest = rows
    columns = [i for i, cell in enumerate(head) if UNITS.search(cell)]
    return sum(len(FIGURE.findall(cell)) for row in rest for cell in row) + sum(
        bool(re.match(r"[-+]?\d", row[i])) for row in rest for i in columns if i < len(row)
    )


def faults(text, page):
    """A line for each section with measured figures that lacks a date or a command."""
    for line, heading, section in sections(text):
        few = all(figures(rows) < FEW for rows in tables(section))
        if few or (page, heading) in NOT_MEASURED:
            continue
        lacks = [
            what for what, pattern in (("date", DATE), ("command", COMMAND)) if not pattern.search(section)
        ]
        if lacks:
            yield (
                f"{page}:{line}: the section {heading!r} has a table of figures and no {' and no '.join(lacks)}: "
                "write when it was measured (2026-11-27) and by which command (`posttrain ...`, `python ...`), link the "
                "source in the paragraph before it or in the table, or "
                "name the section in NOT_MEASURED of tests/test_docs_figures.py, with what its figures are"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_of_figures_have_a_date_and_a_command(page):
    assert not (found := [*faults(page.read_text("utf-8"), name_of(page))]), "\n" + "\n".join(found)


def test_sections_that_are_left_out_would_be_found(monkeypatch):
    left_out = set(NOT_MEASURED)
    monkeypatch.setattr("test_docs_figures.NOT_MEASURED", {})
    found = "\n".join(fault for page in PAGES for fault in faults(page.read_text("utf-8"), name_of(page)))
    assert [
        (page, heading)
        for page, heading in left_out
        if not re.search(rf"^{re.escape(page)}:\d+: the section {re.escape(repr(heading))}", found, re.M)
    ] == []


TABLE = "| what | s |\n| --- | --- |\n| a | 1.5 |\n| b | 20 s |\n| c | 3 % |\n| d | 4.25 GB |\n"


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (f"## A\n{TABLE}", ["no date and no command"]),
        (f"## A\n2026-11-27\n{TABLE}", ["no command"]),
        (f"## A\n`posttrain run a`\n{TABLE}", ["no date:"]),
        (f"## A\n2026-11-27: `posttrain run a`\n{TABLE}", []),
        (f"## A\n2026-11-27\n```bash\npython a.py\n```\n{TABLE}", []),
        (f"## A\n2026-11-27: `posttrain run a`\n## B\n{TABLE}", ["page.md:3: the section 'B'"]),
        ("## A\n" + TABLE.replace("what", "field"), []),
        ("## A\n" + TABLE.replace("| d | 4.25 GB |\n", "").replace("| s |", "| |"), []),
        (
            "## A\n" + TABLE.replace("| a | 1.5 |", "| a | 0.4 [0.3, 0.5] |").replace("| s |", "| |"),
            ["no date and no command"],
        ),
        ("## A\nAs [reported](https://a.example/b):\n\n" + TABLE, []),
        (
            "## A\n[Reported](https://a.example/b) otherwise.\n\nMeasured:\n\n" + TABLE,
            ["no date and no command"],
        ),
        ("## A\n" + TABLE.replace("20 s", "`20 s`").replace("| s |", "| |"), []),
        (f"## A\n```text\n{TABLE}```\n", []),
    ],
)
def test_a_table_without_a_date_or_command_is_found(text, lacks):
    found = [*faults(text, "page.md")]
    assert len(found) == len(lacks)
    assert all(words in fault for words, fault in zip(lacks, found, strict=True))
