"""Every command and every block of Python in the pages is run, or marked with what it needs and checked."""

import os
import sys

import page_runs
import pytest
import torch
from page_checks import inline_problems, problems
from page_commands import Checker
from pages import PAGES, ROOT, name_of, read


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_shows_is_right(page):
    assert not (found := problems(page.read_text("utf-8"), name_of(page))), "\n" + "\n".join(found)


def test_commands_that_the_changelog_names_exist():
    text = (ROOT / "docs" / "changelog.md").read_text("utf-8")
    assert not (found := [*inline_problems(text, "docs/changelog.md", Checker())]), "\n" + "\n".join(found)


def blocks_of(page):
    return read(page.read_text("utf-8"), name_of(page))[0]


def in_matrix(block):
    return block.marks.get("runs") == "matrix"


PLAIN = [page for page in PAGES if any(page_runs.is_run(b) and not in_matrix(b) for b in blocks_of(page))]
WHOLE = [page for page in PAGES if any(page_runs.is_run(b) and in_matrix(b) for b in blocks_of(page))]
copies = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="runs in copies of this process"
)


@pytest.fixture
def made(tmp_path_factory):
    """A folder for what pages are given: one for all processes of pytest."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pages"


@copies
@pytest.mark.parametrize("page", PLAIN, ids=name_of)
def test_what_a_page_shows_runs(page, tmp_path, made):
    blocks = [block for block in blocks_of(page) if not in_matrix(block)]
    assert not (failed := page_runs.failure(blocks, tmp_path, made)), "\n" + failed


@copies
@pytest.mark.matrix
@pytest.mark.parametrize("page", WHOLE, ids=name_of)
def test_all_that_a_page_shows_runs(page, tmp_path, made):
    assert not (failed := page_runs.failure(blocks_of(page), tmp_path, made)), "\n" + failed
