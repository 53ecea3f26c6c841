"""Does a reward give the same scores here as elsewhere? Fixed images, their scores, and all they depend on.

The file's format is in docs/conformance.md.
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
from posttrain.scoring.folder import scored
from posttrain.scoring.probes import COUNT, probe
from posttrain.support.versions import versions

if TYPE_CHECKING:
    from PIL.Image import Image

    from posttrain.reward import Reward

FORMAT = 1
PACKAGES = ("posttrain", "torch", "numpy", "pillow", "transformers")


def conformance(reward: Reward, device: torch.device) -> dict[str, Any]:
    """The reward's scores of the fixed images that it can judge, with what they depend on.

    Raises RewardError where it can judge none, or fails.
    """
    cases = [(i, *probe(i)) for i in range(COUNT)]
    cases = [case for case in cases if reward.unusable(case[2]) is None]
    if not cases:
        raise RewardError(f"{reward.label}: none of the conformance prompts can be scored by it")
    scorer = checked(reward.label, reward.load(device))
    found = scored([(image, row) for _, image, row in cases], {reward.label: scorer}, 4)
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
            for (index, image, row), scores in zip(cases, found, strict=True)
        ],
    }


def image_hash(image: Image) -> str:
    """The SHA-256 of width and height in decimal, a line feed each, and the RGB bytes, row by row."""
    return hashlib.sha256(f"{image.width}\n{image.height}\n".encode() + image.tobytes()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """A conformance file. Raises RewardError where it is none."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise RewardError(f"{path}: not a conformance file: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("cases"), list):
        raise RewardError(f"{path}: not a conformance file of format {FORMAT}, as --conformance writes it")
    return data


def differences(here: Mapping[str, Any], there: Mapping[str, Any], tolerance: float) -> list[str]:
    """What differs between two files, in words; versions and devices may.

    Scores may differ by ``tolerance`` times the larger of 1 and their size.
    """
    found = [
        f"{key}: {here[key]!r} here, {there.get(key)!r} there"
        for key in ("reward", "settings")
        if here[key] != there.get(key)
    ]
    ours, theirs = _flat(here.get("weights", {})), _flat(there.get("weights", {}))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            found.append(f"weights.{name}: SHA-256 {ours.get(name)} here, {theirs.get(name)} there")
    cases = {case["index"]: case for case in here["cases"]}
    others = {case["index"]: case for case in there["cases"]}
    for index in sorted({*cases, *others}):
        if index not in cases or index not in others:
            found.append(f"case {index}: only {'here' if index in cases else 'there'}")
        else:
            found += [f"case {index}: {words}" for words in _unlike(cases[index], others[index], tolerance)]
    return found


def _unlike(here: Mapping[str, Any], there: Mapping[str, Any], tolerance: float) -> Iterator[str]:
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
