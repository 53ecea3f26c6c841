"""Records a reward's scores of fixed images, and compares them with the record of another machine.

docs/conformance.md describes the format of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import RewardError
from posttrain.reward import checked
from posttrain.scoring.folder import score_images
from posttrain.scoring.probes import COUNT, probe
from posttrain.support.versions import versions

if TYPE_CHECKING:
    from PIL.Image import Image

    from posttrain.reward import Reward

FORMAT = 1
BATCH_SIZE = 4
CASE: dict[str, Any] = {"index": int, "prompt": str, "image": str, "score": int | float, "details": dict}
"""What each case of a record has, and its type."""
PACKAGES = ("posttrain", "torch", "numpy", "pillow", "transformers")
"""Packages whose versions a record names."""


def conformance(reward: Reward, device: torch.device) -> dict[str, Any]:
    """Score the fixed images that ``reward`` can judge; return the scores and everything they depend on.

    Raises RewardError if the reward can judge none of them, or fails.
    """
    cases = [(i, *probe(i)) for i in range(COUNT)]
    cases = [case for case in cases if reward.prompt_problem(case[2]) is None]
    if not cases:
        raise RewardError(f"{reward.label}: none of the conformance prompts can be scored by it")
    scorer = checked(reward.label, reward.load(device))
    images = [(image, row) for _, image, row in cases]
    scores_of_images = score_images(images, {reward.label: scorer}, BATCH_SIZE)
    prefix = f"{reward.label}/"
    return {
        "format": FORMAT,
        "reward": reward.label,
        "settings": reward.measures(),
        "weights": reward.hashes(),
        "device": str(device),
        "versions": {**versions((*PACKAGES, *reward.requires)), "machine": platform.machine()},
        "cases": [
            {
                "index": index,
                "prompt": row["prompt"],
                "image": image_hash(image),
                "score": scores[reward.label],
                "details": {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)},
            }
            for (index, image, row), scores in zip(cases, scores_of_images, strict=True)
        ],
    }


def image_hash(image: Image) -> str:
    """The SHA-256 of the width and the height in decimal, each with a line feed, and the RGB bytes by row."""
    return hashlib.sha256(f"{image.width}\n{image.height}\n".encode() + image.tobytes()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """Read a conformance file. Raises RewardError if ``path`` is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RewardError(f"{path}: not a conformance file: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("cases"), list):
        raise RewardError(f"{path}: not a conformance file of format {FORMAT}, as --conformance writes it")
    for number, case in enumerate(data["cases"], 1):
        if not isinstance(case, dict) or not all(isinstance(case.get(k), kind) for k, kind in CASE.items()):
            raise RewardError(f"{path}: case {number} is not as it was written: it needs {', '.join(CASE)}")
    return data


def differences(here: Mapping[str, Any], there: Mapping[str, Any], tolerance: float) -> list[str]:
    """A line for each difference between two records; versions and devices are not compared.

    Scores may differ by ``tolerance`` times the larger of 1 and their absolute value.
    """
    lines = [
        f"{key}: {here[key]!r} here, {there.get(key)!r} there"
        for key in ("reward", "settings")
        if here[key] != there.get(key)
    ]
    ours, theirs = _flat(here.get("weights", {})), _flat(there.get("weights", {}))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            lines.append(f"weights.{name}: SHA-256 {ours.get(name)} here, {theirs.get(name)} there")
    cases = {case["index"]: case for case in here["cases"]}
    others = {case["index"]: case for case in there["cases"]}
    for index in sorted({*cases, *others}):
        if index not in cases or index not in others:
            lines.append(f"case {index}: only {'here' if index in cases else 'there'}")
        else:
            of_case = _case_differences(cases[index], others[index], tolerance)
            lines += [f"case {index}: {line}" for line in of_case]
    return lines


def _case_differences(here: Mapping[str, Any], there: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    for key in ("prompt", "image"):
        if here[key] != there[key]:
            yield f"another {key}: {here[key]} here, {there[key]} there"
    ours, theirs = ({"score": case["score"], **case["details"]} for case in (here, there))
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{name}: {a} here, {b} there"


def _flat(weights: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{name}.{file}": digest for name, files in weights.items() for file, digest in files.items()}
