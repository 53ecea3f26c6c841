"""The laws of a reward."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain.reward import Reward, Scores, checked
from posttrain.scoring.probes import COUNT, probe
from posttrain.testing.law import BlockLaws, law, require

if TYPE_CHECKING:
    from posttrain.reward import Scorer

CPU = torch.device("cpu")


class RewardLaws(BlockLaws):
    """What every reward keeps: ``reward = Mine()``. It is loaded on the CPU, with the weights it names.

    It scores the images and prompts of a conformance file (docs/conformance.md), with GenEval's metadata.
    """

    about = "reward"
    family = Reward
    reward: Reward
    rows: Sequence[Mapping[str, Any]] = ()
    """Rows, each with ``prompt``, in place of those, for a reward that needs other prompts or metadata."""
    tolerance: float = 1e-4
    """How far scores of equal images may differ in other batches, over the larger of 1 and the score."""

    def cases(self) -> list[tuple[list[Tensor], list[Mapping[str, Any]]]]:
        """Batches of images (3, h, w) float32 in [0, 1] of one size, with their rows."""
        batches: dict[tuple[int, ...], tuple[list[Tensor], list[Mapping[str, Any]]]] = {}
        for i in range(COUNT):
            image, row = probe(i)
            row = self.rows[i % len(self.rows)] if self.rows else row
            if self.reward.prompt_problem(row) is None:
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
                images, rows = batches.setdefault(tuple(pixels.shape), ([], []))
                images.append(pixels)
                rows.append(row)
        require(batches, "prompt_problem refuses every prompt: give 'rows' of your own in the class of tests")
        return list(batches.values())

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The loaded reward. pytest makes an object for each test."""
        return checked(self.reward.label, self.reward.load(CPU))

    def score(
        self, images: Sequence[Tensor], rows: Sequence[Mapping[str, Any]], scorer: Scorer | None = None
    ) -> Scores:
        """The scores of ``images``."""
        return (scorer or self.scorer)(torch.stack(list(images)), [row["prompt"] for row in rows], rows)

    def furthest(self, one: Scores, other: Scores) -> float:
        """The largest distance of scores and of details."""
        pairs = [(one.value, other.value)]
        pairs += [(values, other.details[name]) for name, values in one.details.items()]
        return max(self.distance(*pair) for pair in pairs)

    def distance(self, one: Tensor, other: Tensor) -> float:
        """The largest difference of scores, over the larger of 1 and the score."""
        one, other = one.double(), other.double()
        return float(((one - other).abs() / one.abs().clamp(min=1)).max())

    @law(
        "it says its range, and which packages and weights it needs",
        "write 'range: ClassVar = (lowest, highest)', and 'requires' as a tuple of packages' names",
    )
    def test_it_says_its_range_and_what_it_needs(self) -> None:
        low, high = self.reward.range
        require(low < high, f"range is {low} to {high}")
        require(isinstance(self.reward.requires, tuple), f"requires is {type(self.reward.requires).__name__}")
        unknown = [name for name in self.reward.weights if name not in type(self.reward).model_fields]
        require(not unknown, f"weights name the fields {', '.join(unknown)}, which it lacks")
        require(self.reward.about(), "about() is empty: reports have no words for the score")
        json.dumps(self.reward.measures())

    @law(
        "every image has a finite score in the range, and the scores differ",
        "give the whole range, infinite where there is no bound, and score what the image shows",
    )
    def test_scores_are_finite_differ_and_lie_in_the_range(self) -> None:
        low, high = self.reward.range
        found = torch.cat([self.score(*case).value.double() for case in self.cases()])
        outside = found[(found < low) | (found > high)]
        require(not len(outside), f"{outside.tolist()} outside of {low} to {high}")
        require(found.max() > found.min(), f"all {len(found)} images score {found[0]:.4g}")

    @law(
        "images without a detail have a score too",
        "let no division or logarithm meet 0; where a score is not defined, give the lowest",
    )
    def test_images_of_one_colour_have_a_score(self) -> None:
        low, high = self.reward.range
        for images, rows in self.cases()[:1]:
            for level in (0.0, 0.5, 1.0):
                found = self.score([torch.full_like(images[0], level)], rows[:1]).value
                require(low <= float(found) <= high, f"an image of {level} everywhere scores {float(found)}")

    @law(
        "a score depends on its own image, prompt and row alone",
        "normalise nothing over the batch, and put networks in eval mode",
    )
    def test_a_score_does_not_depend_on_the_others_in_the_batch(self) -> None:
        for images, rows in self.cases():
            together = self.score(images, rows)
            alone = [self.score(images[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
            details = {name: torch.cat([one.details[name] for one in alone]) for name in together.details}
            off = self.furthest(together, Scores(torch.cat([one.value for one in alone]), details))
            require(off <= self.tolerance, f"alone and in a batch of {len(rows)} it is off by {off:.2g}")

    @law(
        "equal images have equal scores, by a reward that was loaded again too",
        "draw no random number without a seed, and keep nothing between calls",
    )
    def test_a_score_can_be_repeated(self) -> None:
        images, rows = self.cases()[0]
        first, state = self.score(images, rows), torch.get_rng_state()
        self.score(*self.cases()[-1])
        loaded_again = checked(self.reward.label, self.reward.load(CPU))
        again = self.score(images, rows, loaded_again)
        require(first.details.keys() == again.details.keys(), "the second time it has other details")
        off = self.furthest(first, again)
        require(off <= self.tolerance, f"the second time it is off by {off:.2g}")
        require(torch.equal(state, torch.get_rng_state()), "torch's global generator was used")
