"""The published evaluation suites: their prompt files, and the rewards that score them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.support.spelling import meant


@dataclass(frozen=True)
class Suite:
    """A published list of prompts, and the rewards that published tables report for it."""

    file: str
    """The prompt file, relative to ``data/``."""
    rows: int
    """Number of prompts."""
    rewards: tuple[str, ...]
    """Names of the rewards."""
    sha256: str | None = None
    """Hash of the rows, each as JSON with sorted keys, as in ``prompts.sha256`` of a result card."""


_NFT = "github.com/NVlabs/DiffusionNFT, dataset"
_GRPO = "github.com/yifan123/flow_grpo, dataset"
PUBLISHED = {
    "geneval/train_metadata.jsonl": f"{_GRPO}/geneval/train_metadata.jsonl",
    "geneval/test_metadata.jsonl": f"{_NFT}/geneval/test_metadata.jsonl",
    "ocr/train.txt": f"{_GRPO}/ocr/train.txt",
    "ocr/test.txt": f"{_GRPO}/ocr/test.txt",
    "pickscore/train.txt": f"{_GRPO}/pickscore/train.txt",
    "pickscore/test.txt": f"{_GRPO}/pickscore/test.txt",
    "drawbench/test.txt": f"{_NFT}/drawbench/test.txt",
}
"""Prompt file -> where it is published. Shipped recipes name each file by a path that ends like this."""
SUITES = {
    "geneval": Suite(
        "geneval/test_metadata.jsonl",
        2212,
        ("geneval",),
        "2db010131b4f548b62d6557072b947a55561652b9a2decf7a0bd08b439616549",
    ),
    "ocr": Suite(
        "ocr/test.txt", 1018, ("ocr",), "2e222731c496620d67569862cd09c52d616d5821bb0bd22748eb5b08ae158c16"
    ),
    "pickscore": Suite("pickscore/test.txt", 2048, ("pickscore",)),
    "drawbench": Suite(
        "drawbench/test.txt",
        1000,
        ("pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward"),
        "7fe82d01c17789deee844b957d6907ec2ccc45d0fd982a516b3e802fed286e79",
    ),
}
PROMPT_FOLDER = Path("data")
"""Where prompt files of suites are expected, relative to the current folder."""


def suite_prompts(name: str, prompts: str | None) -> tuple[str, tuple[str, ...]]:
    """The prompt file of suite ``name`` and the suite's rewards.

    The file is ``prompts``, or by default the one in ``data/``. Raises RecipeError if there is no such suite,
    or if the file is missing; the message then says where it is published.
    """
    if (suite := SUITES.get(name)) is None:
        known = ", ".join(SUITES)
        raise RecipeError(f"--suite: no suite {name!r}{meant(name, SUITES)}; there are {known}")
    file = Path(prompts) if prompts else PROMPT_FOLDER / suite.file
    if not file.is_file():
        raise RecipeError(
            f"no file {str(file)!r} with the prompts of {name!r} ({suite.rows} rows): "
            f"published as {PUBLISHED[suite.file]}; put it there, or name it with --prompts"
        )
    return str(file), suite.rewards


def published_as(sha256: str) -> str | None:
    """The name of the suite whose rows have this hash, or None."""
    return next((name for name, suite in SUITES.items() if suite.sha256 == sha256), None)


def published_where(file: Path) -> str | None:
    """Where the prompt file at ``file`` is published, by its name and its folder's name; None if unknown."""
    return PUBLISHED.get("/".join(file.parts[-2:]))
