"""Batches, items and conditions: what is taken, split, joined and counted, on numbers that differ everywhere."""

import re

import pytest
import torch
from lines import Pull, items_of, line_policy, of

from posttrain.algorithm import Batch, Items, Losses, Tools, Verdict
from posttrain.condition import EMPTY_PROMPT, Conditions, concatenated
from posttrain.distributed.world import ALONE, World
from posttrain.support.randomness import Draws

TABLE = Conditions({"c": torch.tensor([-1.0, 10, 20, 30]), "wide": torch.arange(8.0).view(4, 2)})


def listed(condition):
    return {name: tensor.tolist() for name, tensor in condition.items()}


def test_conditions_are_looked_up_by_row_and_row_0_is_the_empty_prompt():
    assert EMPTY_PROMPT == 0
    assert listed(TABLE.rows(torch.tensor([3, 1, 1]))) == {
        "c": [30, 10, 10],
        "wide": [[6, 7], [2, 3], [2, 3]],
    }
    empty = TABLE.empty(3)
    assert listed(empty) == {"c": [-1] * 3, "wide": [[0, 1]] * 3}
    assert empty["wide"].data_ptr() == TABLE.table["wide"].data_ptr(), "a view"
    joined = concatenated(TABLE.rows(torch.tensor([2])), TABLE.empty(1))
    assert listed(joined) == {"c": [20, -1], "wide": [[4, 5], [0, 1]]}


def test_a_batch_knows_its_places_and_its_total_by_default():
    batch = Batch(torch.zeros(3, 1), torch.tensor([2, 1, 3]), TABLE)
    assert (len(batch), batch.total, batch.sample_index.tolist()) == (3, 3, [0, 1, 2])
    assert batch.sample_index.dtype == torch.int64
    assert (batch.metadata, batch.group) == ((), None)
    elsewhere = Batch(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64, device="meta"), TABLE)
    assert elsewhere.sample_index.device.type == "meta"
    given = Batch(torch.zeros(2, 1), torch.tensor([1, 2]), TABLE, sample_index=torch.tensor([4, -1]), total=9)
    assert (given.total, given.sample_index.tolist()) == (9, [4, -1])
    # without samples, but of a batch whose others are elsewhere
    assert Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), TABLE, total=5).total == 5


def test_some_samples_of_a_batch_keep_all_that_is_theirs():
    batch = Batch(
        torch.arange(4.0).view(4, 1),
        torch.tensor([3, 1, 2, 1]),
        TABLE,
        [{"n": i} for i in range(4)],
        group=torch.tensor([5, 6, 7, 8]),
        sample_index=torch.tensor([9, 8, 7, 6]),
        total=12,
    )
    part = batch.take(slice(1, 3))
    assert part.latents.tolist() == [[1], [2]]
    assert part.prompt_index.tolist() == [1, 2]
    assert part.metadata == [{"n": 1}, {"n": 2}]
    assert (part.group.tolist(), part.sample_index.tolist(), part.total) == ([6, 7], [8, 7], 12)
    assert part.conditions is TABLE
    assert Batch(torch.zeros(3, 1), torch.arange(3), TABLE).take(slice(2)).group is None


def test_items_are_read_by_name_and_name_what_they_have():
    items = items_of([1, 2, 3])
    assert items.x.tolist() == [1, 2, 3]
    assert listed(items.condition) == {"c": [1, 2, 3]}
    assert len(items) == 3
    with pytest.raises(
        AttributeError, match=r"no field 'latents'; these items have \['prompt_index', 'sample_index', 'x'\]"
    ):
        items.latents  # noqa: B018


@pytest.mark.parametrize(
    ("given", "lack"),
    [
        (["x"], "'prompt_index' and 'sample_index'; they have ['x']"),
        (["x", "prompt_index"], "'sample_index'; they have ['prompt_index', 'x']"),
        (["sample_index"], "'prompt_index'; they have ['sample_index']"),
    ],
)
def test_items_without_a_required_field_are_refused_with_its_name(given, lack):
    with pytest.raises(ValueError, match=f"^items lack {re.escape(lack)}$"):
        Items(torch.ones(2), {name: torch.zeros(2, dtype=torch.int64) for name in given}, TABLE)


@pytest.mark.parametrize("name", ["weight", "conditions", "condition", "take", "nbytes"])
def test_a_field_that_an_attribute_would_hide_is_refused(name):
    rows = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"a field cannot be called '{name}'"):
        Items(torch.ones(2), {"prompt_index": rows, "sample_index": rows, name: rows}, TABLE)


def test_a_weight_that_is_not_one_number_for_each_item_is_refused():
    rows = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight has the shape \(2, 1\), not \(n,\)"):
        Items(torch.ones(2, 1), {"prompt_index": rows, "sample_index": rows}, TABLE)


@pytest.mark.parametrize(("weight", "x"), [(2, 3), (3, 2)])
def test_items_of_which_one_part_has_another_length_are_refused_with_all_lengths(weight, x):
    rows = torch.zeros(3, dtype=torch.int64)
    listed = f"weight {weight}, prompt_index 3, sample_index 3, x {x}"
    with pytest.raises(ValueError, match=f"must have the same length; they have {listed}$"):
        Items(torch.ones(weight), {"prompt_index": rows, "sample_index": rows, "x": torch.zeros(x, 5)}, TABLE)


def test_scores_are_joined_in_order_and_rewards_stay_apart_from_details():
    first = Verdict(
        {"a": torch.tensor([1.0, 2]), "b": torch.tensor([3.0, 4])}, {"a/d": torch.tensor([5.0, 6])}
    )
    second = Verdict({"a": torch.tensor([7.0]), "b": torch.tensor([8.0])}, {"a/d": torch.tensor([9.0])})
    whole = Verdict.cat([first, second])
    assert listed(whole.rewards) == {"a": [1, 2, 7], "b": [3, 4, 8]}
    assert listed(whole.details) == {"a/d": [5, 6, 9]}
    assert listed(Verdict.cat([first]).rewards) == {"a": [1, 2], "b": [3, 4]}


def test_items_are_taken_split_and_joined_in_order():
    items = items_of([1, 2, 3, 4, 5], weight=[5, 4, 3, 2, 1])
    some = items.take(torch.tensor([4, 0]))
    assert (some.weight.tolist(), some.x.tolist(), some.prompt_index.tolist()) == ([1, 5], [5, 1], [5, 1])
    assert some.conditions is items.conditions
    runs = list(items.split(2))
    assert [run.x.tolist() for run in runs] == [[1, 2], [3, 4], [5]]
    assert [run.weight.tolist() for run in runs] == [[5, 4], [3, 2], [1]]
    whole = Items.cat(runs)
    assert (whole.weight.tolist(), whole.x.tolist(), whole.sample_index.tolist()) == (
        [5, 4, 3, 2, 1],
        [1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4],
    )
    assert whole.conditions is items.conditions
    assert whole.metrics == {}
    assert list(items.take(slice(0)).split(2)) == []
    assert Items.cat([some]).x.tolist() == [5, 1]


def test_parts_go_by_place_and_one_part_is_the_whole():
    items = items_of([1, 2, 3, 4, 5], sample_index=[7, 0, 2, 4, 1])
    assert [part.x.tolist() for part in items.parts_by_sample(3)] == [[2], [1, 4, 5], [3]]
    assert [part.x.tolist() for part in items.parts_by_sample(2)] == [[2, 3, 4], [1, 5]]
    (only,) = items.parts_by_sample(1)
    assert only is items


def test_bytes_are_those_of_weights_and_fields():
    # weight and x are float32, prompt and place int64
    assert items_of([1, 2, 3]).nbytes == 3 * (4 + 4 + 8 + 8)
    assert items_of([]).nbytes == 0


def test_losses_and_items_begin_without_metrics_of_their_own():
    assert Losses(torch.zeros(1)).metrics == {}
    assert items_of([1]).metrics == {}


def test_what_an_algorithm_is_lent_by_default():
    tools = Tools(line_policy(), Draws((0,), [1]))
    assert tools.judge is None
    assert tools.world is ALONE
    with pytest.raises(NotImplementedError, match="only a stage with prompts has a sampling grid"):
        tools.sigmas(3)


def test_an_algorithm_that_declares_nothing_needs_nothing():
    pull = Pull()
    assert pull.roles == frozenset()
    assert pull.samples_per_prompt == 1
    policy = line_policy(3)
    policy.add_role("old")
    super(Pull, pull).after_batch(policy, 1)
    super(Pull, pull).check_on_policy(Losses(torch.tensor([99.0])))
    assert policy.roles["old"]["a"].item() == 3


def test_a_world_of_one_is_the_identity():
    values = torch.tensor([1.0, 2.0])
    assert (ALONE.rank, ALONE.size, ALONE.is_main) == (0, 1, True)
    assert not World(1, 2).is_main
    for made in (ALONE.sum(values), ALONE.gather(values), ALONE.local(values), ALONE.broadcast(values)):
        assert made is values
    assert (ALONE.max(3), ALONE.gather_objects("a")) == (3, ["a"])
    ALONE.barrier()
    with ALONE.main_first():
        pass


def test_the_helpers_of_these_tests_make_a_batch_of_their_numbers():
    batch, _ = of([4, 5], sample_index=[1, 0])(line_policy())
    assert batch.latents.flatten().tolist() == [4, 5]
    assert batch.sample_index.tolist() == [1, 0]
