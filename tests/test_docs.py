"""The pages name files, headings and commands that exist. What the code says of fields, test_reference.py checks."""

import re
import subprocess
from pathlib import Path

import pytest

from posttrain.recipe.schema import Recipe
from posttrain.registry import Spec

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINKED = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`([\w.\-*/]+/[\w.\-*]*|[\w\-]+\.(?:py|md|toml|sh|txt|cfg))`")
"""What stands alone in backticks and is a path, or a file's name."""
RUN_TIME = (
    ".venv/",
    "runs/",
    "data/",
    "images/",
    "final/",
    "exact/",
    "grid/",
    "checkpoints/",
    "evaluation/",
    "samples/",
    "STAGE/",
    "base/",
)
"""Folders that a run, its user, or the installation makes."""


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def names(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_relative_links_lead_to_files_and_headings(page):
    for target in LINKED.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{names(page)}: {target}"
        if page.parent == ROOT / "docs":  # the site has docs/ alone
            assert file.parent == page.parent, (
                f"{names(page)}: {target} leads out of docs/, which the site does not have: name the file in backticks"
            )
        assert not anchor or anchor in anchors(file), f"{names(page)}: no heading {target}"


WRITTEN = [page for page in PAGES if not page.read_text(encoding="utf-8").startswith("<!-- Made")]
"""Pages that were written by hand. `tests/reference` makes the others, of which names of models are a part."""


@pytest.mark.parametrize("page", WRITTEN, ids=names)
def test_files_that_a_page_mentions_exist(page):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    tracked = tracked or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.*")]
    for mentioned in FILE.findall(page.read_text()):
        if mentioned.startswith(RUN_TIME) or "://" in mentioned or mentioned in OTHERS:
            continue
        found = [mentioned, f"posttrain/{mentioned}", f"docs/{mentioned}"]
        known = any(list(ROOT.glob(path)) for path in found)
        assert known or any(path.endswith(f"/{mentioned}") for path in tracked), f"{names(page)}: {mentioned}"


@pytest.mark.parametrize("page", WRITTEN, ids=names)
def test_a_list_or_table_does_not_touch_the_block_before_it(page):
    """On the site it would be one paragraph."""
    inside, before = False, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not inside and before.strip() == "```" and re.match(r"- |\d+\. |\|", line):
            raise AssertionError(f"{names(page)}:{number}: an empty line is missing above {line[:40]!r}")
        if line.lstrip().startswith("```"):
            inside = not inside
        before = line


OTHERS = {
    "stabilityai/stable-diffusion-3.5-medium",
    "posttrain/tiny-sd3",
    "mine.py",
    "shapes/lenient",
}
"""Hub names, the shipped model's name, files of a reader's own, and a score."""


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_scripts_and_tests_that_a_page_runs_exist(page):
    for script in re.findall(
        r"(?:python3?(?: -m pytest)?|pytest) (?:-\S+ )*([\w/]+(?:\.py)?)\b", page.read_text()
    ):
        if "/" in script or script.endswith(".py"):
            assert (ROOT / script).exists(), f"{names(page)}: {script}"
    for script in re.findall(r"`((?:benchmarks|tests)/[\w/.]+)", page.read_text()):
        assert (ROOT / script).exists(), f"{names(page)}: {script}"


def specs(base=Spec):
    """Every class of a recipe's blocks: the recipe, algorithms, rewards, models, data, strategies, the rest."""
    for spec in base.__subclasses__():
        if spec.__module__.startswith("posttrain."):
            yield spec
            yield from specs(spec)


SPECS = sorted({Recipe, *specs()}, key=str)
"""Importing the recipe's schema has loaded every variant."""


@pytest.mark.parametrize("spec", SPECS, ids=lambda x: x.__name__)
def test_every_field_of_a_block_says_what_it_means(spec):
    own = {name: field for name, field in spec.model_fields.items() if name != "type"}
    assert [name for name, field in own.items() if not field.description] == []
