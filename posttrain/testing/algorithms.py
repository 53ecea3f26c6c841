"""The laws of an algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from posttrain.algorithm import Algorithm, Items
from posttrain.engine.rehearsal import rehearse
from posttrain.testing.law import BlockLaws, law, require
from posttrain.testing.toys import collected, gradient, toy_policy

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.policy import Policy

DRAWN = "draw every random number in collect from tools.draws, each purpose by a name of its own"


class AlgorithmLaws(BlockLaws):
    """What every algorithm keeps, shown on a network of 420 weights: ``algorithm = Mine()``.

    Give groups and rollouts a small size: a test takes 100 forwards or so of what the settings ask for.
    """

    about = "algorithm"
    family = Algorithm
    algorithm: Algorithm

    def collected(self, policy: Policy | None = None, **settings: Any) -> Items:
        """What the algorithm collects from a toy batch of 6 prompts."""
        return collected(self.algorithm, policy or toy_policy(), **settings)

    @property
    def samples(self) -> int:
        """Samples of the toy batch."""
        return 6 * self.algorithm.samples_per_prompt

    @law(
        "the gradient does not depend on the micro-batch",
        "return from loss one number for each item, which depends on that item alone: no mean over the batch",
    )
    def test_the_gradient_does_not_depend_on_the_micro_batch(self) -> None:
        whole = gradient(self.algorithm, 1000)
        require(whole.abs().max() > 1e-4, "no weight has a gradient: loss must use policy.velocity")
        for size in (1, 5):
            # large factors, such as DPO's beta, multiply the rounding that kernels for one row do differently
            off = (gradient(self.algorithm, size) - whole).norm() / whole.norm()
            require(off < 3e-4, f"in micro-batches of {size} the gradient is off by {off:.2g} of its length")

    @law("loss draws no random number", f"{DRAWN}, and hand it on as a field of the items")
    def test_loss_draws_no_random_number(self) -> None:
        policy = toy_policy()
        items = self.collected(policy)
        state = torch.get_rng_state()
        first, second = (self.algorithm.loss(items, policy).per_item for _ in range(2))
        require(torch.equal(first, second), f"two calls differ by up to {(first - second).abs().max():.2g}")
        require(torch.equal(state, torch.get_rng_state()), "torch's global generator was used")

    @law("all randomness of collect comes from tools.draws", DRAWN)
    def test_all_randomness_comes_from_the_draws(self) -> None:
        policy = toy_policy()
        items, state = self.collected(policy), torch.get_rng_state()
        again = self.collected(policy)
        require(torch.equal(state, torch.get_rng_state()), "torch's global generator was used")
        other = [name for name in _of(items) if not torch.equal(_of(items)[name], _of(again)[name])]
        require(not other, f"a second call gave another {', '.join(other)}")
        later = self.collected(policy, step=1)
        require(
            any(
                not torch.equal(values, later.fields[name])
                for name, values in items.fields.items()
                if name not in ("prompt_index", "sample_index")
            ),
            "the next step draws the same numbers",
        )

    @law(
        "a sample draws the same in any batch",
        "draw by tools.draws.normal and the like, which give each sample numbers of its own",
    )
    def test_a_sample_draws_the_same_in_any_batch(self) -> None:
        big, small = self.collected(), self.collected(prompts=4)
        kept = big.take(big.sample_index < 4 * self.algorithm.samples_per_prompt)
        require(len(kept) == len(small), f"{len(small)} items alone, {len(kept)} in a larger batch")
        for name in ("latents", "sigma"):
            if name in small.fields:
                off = (kept.fields[name] - small.fields[name]).abs().max()
                require(off < 1e-4, f"{name} differ by up to {off:.2g}")

    @law(
        "the cost and the number of items are what the plan counts",
        "let no branch of collect and loss depend on a batch's values, and call the model by policy.velocity",
    )
    def test_cost_and_items_are_what_the_plan_counts(self) -> None:
        policy, counted = toy_policy(), rehearse(self.algorithm)
        items = self.collected(policy)
        require(len(items) == self.samples * counted.items, f"{len(items)} items of {self.samples} samples")
        self.algorithm.loss(items, policy)
        planned = self.samples * counted.forward_equivalents
        found = f"{policy.forward_equivalents} forward-equivalents, {planned:g} in the plan"
        require(policy.forward_equivalents == planned, found)

    @law(
        "collect does not depend on how many rows a forward takes",
        "let each row of a rollout depend on its own sample alone",
    )
    def test_collect_does_not_depend_on_the_micro_batch(self) -> None:
        one, other = (self.collected(micro_batch=size) for size in (3, 100))
        for name, values in _of(one).items():
            off = _distance(values, _of(other)[name])
            require(off < 1e-4, f"{name} differs by {off:.2g} of its size")

    @law(
        "collect and loss move no weights", "move roles in after_batch; the engine moves the trained weights"
    )
    def test_collect_and_loss_move_no_weights(self) -> None:
        policy = toy_policy()
        self.collected(policy)  # which adds the roles
        held = {"trained": policy.trained, **policy.roles}
        before = {
            role: {name: w.detach().clone() for name, w in weights.items()} for role, weights in held.items()
        }
        self.algorithm.loss(self.collected(policy), policy)
        moved = [
            f"{role} {name}"
            for role, weights in {"trained": policy.trained, **policy.roles}.items()
            for name, weight in weights.items()
            if not torch.equal(weight, before[role][name])
        ]
        require(not moved, f"moved: {', '.join(moved)}")


def _of(items: Items) -> dict[str, Tensor]:
    """The weight and the fields of ``items``."""
    return {"weight": items.weight, **items.fields}


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference over the larger of 1 and the largest value."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1))
