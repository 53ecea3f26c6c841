"""The pages name files, headings, commands and recipe fields that exist, with the defaults that they have."""

import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from posttrain.algorithms._online import Online
from posttrain.algorithms.awm import AWM
from posttrain.algorithms.diffusion_nft import DiffusionNFT
from posttrain.algorithms.dpo import DPO
from posttrain.algorithms.dpo_online import DPOOnline
from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.algorithms.reflexflow import ReflexFlow
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.cache.settings import Cache
from posttrain.data.settings import Images, PairList, Reading
from posttrain.engine.monitor import Monitor
from posttrain.models.sd3 import SD3
from posttrain.optim.settings import Train
from posttrain.policy.tuning import Lora
from posttrain.recipe.schema import Evaluation, Recipe, Stage
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
        if page.parent.name == "docs":  # the site has docs/ alone
            assert file.parent == page.parent, (
                f"{names(page)}: {target} leads out of docs/, which the site does not have: name the file in backticks"
            )
        assert not anchor or anchor in anchors(file), f"{names(page)}: no heading {target}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_a_page_mentions_exist(page):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    tracked = tracked or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.*")]
    for mentioned in FILE.findall(page.read_text()):
        if mentioned.startswith(RUN_TIME) or "://" in mentioned or mentioned in OTHERS:
            continue
        found = [mentioned, f"posttrain/{mentioned}", f"docs/{mentioned}"]
        known = any(list(ROOT.glob(path)) for path in found)
        assert known or any(path.endswith(f"/{mentioned}") for path in tracked), f"{names(page)}: {mentioned}"


OTHERS = {
    "stabilityai/stable-diffusion-3.5-medium",
    "posttrain/tiny-sd3",
    "mine.py",
}
"""Hub names, the shipped model's name, and files of a reader's own."""


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_scripts_and_tests_that_a_page_runs_exist(page):
    for script in re.findall(
        r"(?:python3?(?: -m pytest)?|pytest) (?:-\S+ )*([\w/]+(?:\.py)?)\b", page.read_text()
    ):
        if "/" in script or script.endswith(".py"):
            assert (ROOT / script).exists(), f"{names(page)}: {script}"
    for script in re.findall(r"`((?:benchmarks|tests)/[\w/.]+)", page.read_text()):
        assert (ROOT / script).exists(), f"{names(page)}: {script}"


def tables(heading):
    """The field tables under a heading of docs/recipes.md, each as field -> (default, meaning)."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    parts = re.split(r"^\| field \| default \| meaning \|\n", section, flags=re.M)[1:]
    rows = [re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", part, re.M) for part in parts]
    return [{field: (default, meaning) for field, default, meaning in part} for part in rows]


BLOCKS = [
    ("Top level", 0, Recipe, ()), ("model", 0, SD3, ()), ("cache", 0, Cache, ()), ("stages", 0, Stage, ()),
    ("algorithm", 0, SFT, ()), ("algorithm", 1, SOAR, (SFT,)), ("algorithm", 2, ReflexFlow, (SFT,)),
    ("algorithm", 3, Online, ()), ("algorithm", 4, FlowGRPO, (Online,)), ("algorithm", 5, DiffusionNFT, (Online,)),
    ("algorithm", 6, AWM, (Online,)), ("algorithm", 7, DPO, (SFT,)), ("algorithm", 8, DPOOnline, (SFT,)),
    ("data", 0, Images, ()), ("data", 1, PairList, (Reading,)),
    ("monitor", 0, Monitor, ()), ("lora", 0, Lora, ()), ("train", 0, Train, ()), ("evaluation", 0, Evaluation, ()),
]  # fmt: skip
"""Heading, number of the table below it, what it describes, and whose fields another table has."""
IN_WORDS = {
    (Recipe, "parallel"): "auto", (Recipe, "cache"): "off", (Stage, "tune"): "full", (Stage, "rewards"): "none",
    (Lora, "targets"): "attention", (Cache, "max_size"): "50 GB",
}  # fmt: skip
"""Defaults that a table says in words."""


def default_of(spec, name):
    field = spec.model_fields[name]
    if field.is_required():
        return "-"
    if (spec, name) in IN_WORDS:
        return IN_WORDS[spec, name]
    value = field.get_default(call_default_factory=True)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return float(value)
    return "none" if value is None else str(value).lower()


@pytest.mark.parametrize(
    ("heading", "number", "spec", "elsewhere"), BLOCKS, ids=lambda x: getattr(x, "__name__", "")
)
def test_the_page_of_recipes_has_every_field_with_its_default_and_choices(heading, number, spec, elsewhere):
    others = {"type", *(name for other in elsewhere for name in other.model_fields)}
    rows = tables(heading)[number]
    assert set(rows) == set(spec.model_fields) - others
    for name, (shown, meaning) in rows.items():
        default = default_of(spec, name)
        assert (float(shown) if isinstance(default, float) else shown) == default, name
        choices = [
            choice for choice in get_args(spec.model_fields[name].annotation) if isinstance(choice, str)
        ]
        missing = [choice for choice in choices if not re.search(rf"\b{choice}\b", f"{shown} {meaning}")]
        assert not missing, name


def specs(base=Spec):
    """Every class of a recipe's blocks: the recipe, algorithms, rewards, models, data, strategies, the rest."""
    for spec in base.__subclasses__():
        if spec.__module__.startswith("posttrain."):
            yield spec
            yield from specs(spec)


@pytest.mark.parametrize("spec", sorted(set(specs()), key=str), ids=lambda x: x.__name__)
def test_every_field_of_a_block_says_what_it_means(spec):
    own = {name: field for name, field in spec.model_fields.items() if name != "type"}
    assert [name for name, field in own.items() if not field.description] == []
