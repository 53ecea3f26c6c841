"""Makes the result card ``eval.json``: prompts, model, sampler, rewards and versions, and the scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.errors import RewardError
from posttrain.evaluation.intervals import bootstrap_interval
from posttrain.recipe.suites import published_as
from posttrain.support import user_code
from posttrain.support.differences import differences
from posttrain.support.versions import versions
from posttrain.support.wording import counted
from posttrain.weights.files import sha256

if TYPE_CHECKING:
    from posttrain.recipe.schema import Evaluation
    from posttrain.reward import Reward
    from posttrain.sampler import Sampler

Row = Mapping[str, Any]
FORMAT = 1
PACKAGES = ("posttrain", "torch", "diffusers", "transformers")
FREE = ("versions", "model.source", "prompts.path")
"""Entries that may differ between two calls that measure the same evaluation."""
RESULTS = ("images", "scores", "tags", "tag_means", "forward_equivalents", "seconds", "grid_prompts")
"""Entries that are written when the evaluation is finished."""


def card(sampler: Sampler, evaluation: Evaluation, rows: Sequence[Row], weights: str) -> dict[str, Any]:
    """The result card without results, as it is known before the first sample is drawn.

    ``weights`` says which weights the sampler has ("base", "raw" or "ema").
    """
    settings = _settings(evaluation, rows)
    return {
        "format": FORMAT,
        "prompts": settings["prompts"],
        "model": {
            "source": sampler.source,
            "weights": weights,
            "settings": sampler.settings,
            "sha256": sampler.fingerprint(),
        },
        "sampler": settings["sampler"],
        "shown": settings["shown"],
        "scorers": {r.label: {**r.measures(), "weights": r.hashes()} for r in evaluation.rewards},
        "versions": versions(PACKAGES),
    }


def _settings(evaluation: Evaluation, rows: Sequence[Row]) -> dict[str, Any]:
    """The entries of a card that are known without a model, and without the weights of rewards."""
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {
        "prompts": {
            **evaluation.prompts.model_dump(mode="json"),
            "rows": len(rows),
            "distinct": len({row["prompt"] for row in rows}),
            "sha256": digest,
            "published_as": published_as(digest),
        },
        "sampler": evaluation.model_dump(mode="json", exclude={"prompts", "rewards", "grid", "keep"}),
        "shown": evaluation.model_dump(mode="json", include={"grid", "keep"}),
        "scorers": {r.label: r.measures() for r in evaluation.rewards},
    }


def other_settings(
    before: Mapping[str, Any], evaluation: Evaluation, rows: Sequence[Row], free: Sequence[str] = ()
) -> list[str]:
    """A line for each setting in which the evaluation of the card ``before`` is not ``evaluation``.

    ``free`` are further entries that may differ. Weights of the model are not compared, and for those of
    rewards there is :func:`other_weights`.
    """
    now = _settings(evaluation, rows)
    scorers = {label: {**scorer, "weights": None} for label, scorer in before["scorers"].items()}
    then = {**{name: before[name] for name in now}, "scorers": scorers}
    return list(differences(then, now, (*FREE, *free)))


def other_weights(before: Mapping[str, Any], evaluation: Evaluation) -> Iterator[str]:
    """A line for each file of a reward's weights, or of the user's source, that is another one than gave the
    scores of the card ``before``. Files that are not on this machine are not compared."""
    for reward in evaluation.rewards:
        then = before["scorers"].get(reward.label, {}).get("weights", {})
        # the user's modules are not run: a finished evaluation has no need of what they import
        known = then.get("source", {})
        now = {name: sha256(file) for name in known if (file := user_code.file_of(name)) is not None}
        old = {name: known[name] for name in now}
        yield from differences(old, now, path=f"scorers.{reward.label}.weights.source")
        for name, weights in reward.weights.items():
            if (path := weights.local(getattr(reward, name))) is not None:
                known = then.get(name, {})
                now = {file: digest for file, digest in weights.hashes(path).items() if file in known}
                old = {file: known[file] for file in now}
                yield from differences(old, now, path=f"scorers.{reward.label}.weights.{name}")


def result(records: Sequence[Row], rewards: Sequence[Reward]) -> dict[str, Any]:
    """The scores over all samples and over those of each tag, and each score's mean of the tags' means.

    A record has ``prompt``, ``tag`` and ``scores``. Raises RewardError as :func:`summaries`.
    """
    of_all = summaries(records, rewards)
    tags = {
        tag: summaries([r for r in records if r["tag"] == tag], rewards)
        for tag in dict.fromkeys(r["tag"] for r in records if r["tag"] is not None)
    }
    names = of_all if tags else ()
    means = {name: float(np.mean([scores[name]["mean"] for scores in tags.values()])) for name in names}
    return {
        "images": len(records),
        "scores": of_all,
        "tags": tags,
        "tag_means": means,
    }


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each entry in which two cards describe different evaluations, with both values."""
    one, other = ({k: v for k, v in c.items() if k not in RESULTS} for c in (before, now))
    return list(differences(one, other, FREE))


def summaries(records: Sequence[Row], rewards: Sequence[Reward]) -> dict[str, dict[str, Any]]:
    """Each score's mean with its 95 % bootstrap interval, the number of samples, and the direction.

    The bootstrap draws prompts, or images if there is only one prompt. Raises RewardError if an image lacks a
    score that others have.
    """
    groups = [record["prompt"] for record in records]
    names = dict.fromkeys(name for record in records for name in record["scores"])
    by_score = {}
    for name in names:
        if lacking := [record["prompt"] for record in records if name not in record["scores"]]:
            raise RewardError(
                f"no score {name!r} for {counted(len(lacking), 'image')}, the first of {lacking[0]!r}: a "
                "reward must give equal details for all images"
            )
        reward = next(r for r in rewards if r.label == name.split("/")[0])
        values = np.array([record["scores"][name] for record in records])
        low, high = bootstrap_interval(values, groups=groups)
        by_score[name] = {
            "mean": float(values.mean()),
            "low": low,
            "high": high,
            "count": len(values),
            "higher_is_better": reward.higher_is_better,
        }
    return by_score
