"""GenEval's rules on boxes whose numbers are worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rewards._geneval import COMPONENT, OVERLAP, graded, lenient, relations, strict
from posttrain.rewards._geneval_scores import JUDGES, metadata_problem, scores
from posttrain.rewards.shapes import Shapes

CPU = torch.device("cpu")


def box(x, y, w=10.0, h=10.0):
    """A box by its middle and its sides."""
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def thing(x=0.0, y=0.0, color="red"):
    return {"box": box(x, y), "score": 0.9, "color": color}


def clause(kind, count=1, **more):
    return {"class": kind, "count": count, **more}


def task(*include, **more):
    return {"include": list(include), **more}


def test_the_published_constants():
    assert (OVERLAP, COMPONENT) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (20, 0, {"right of"}), (-20, 0, {"left of"}), (0, 20, {"below"}), (0, -20, {"above"}),
        (20, 20, {"right of", "below"}), (-20, -20, {"left of", "above"}), (0, 0, set()),
        # the sides add up to 20, so offsets shrink by 2
        (2, 0, set()), (2.0009, 0, set()), (2.002, 0, set()), (2.1, 0, set()), (3.9, 0, set()), (4.1, 0, {"right of"}),
        # the part along an axis must be more than half of the offset that was not reduced
        (12, 20, set()), (20, 12, {"right of"}), (20, 15, {"right of", "below"}), (20, 13, {"right of"}), (20, 14.5, {"right of", "below"}),
    ],
)  # fmt: skip
def test_a_box_of_10_lies_so_to_another_at_the_origin(x, y, expected):
    if (x, y) == (12, 20):  # 10 of 23.3 along x, 18 of it along y
        expected = {"below"}
    assert relations(box(x, y), box(0, 0)) == expected
    assert relations(box(x + 100, y + 7), box(100, 7)) == expected, "only the offset counts"


def test_exactly_half_is_not_enough():
    # 5 of a length of 10 along x: (6, 8) less a tenth of sides that add up to 10
    assert relations(box(6, 8, 5, 0), box(0, 0, 5, 0)) == {"below"}
    assert relations(box(6, 8, 4.9, 0), box(0, 0, 5, 0)) == {"right of", "below"}
    assert relations(box(8, 6, 0, 5), box(0, 0, 0, 5)) == {"right of"}
    assert relations(box(8, 6, 0, 5), box(0, 0, 0, 4.9)) == {"right of", "below"}


def test_offsets_that_reach_no_further_than_the_overlap_are_none():
    # reduced to 0.0009 on both axes: touching, whatever the direction; at 0.0011 still no half of it
    assert relations(box(0.0009, 0.0009, 0, 0), box(0, 0, 0, 0)) == set()
    assert relations(box(0.0011, 0.0009, 0, 0), box(0, 0, 0, 0)) == {"right of", "below"}
    assert relations(box(0.0009, -0.0011, 0, 0), box(0, 0, 0, 0)) == {"right of", "above"}
    assert relations(box(0.001, 0, 0, 0), box(0, 0, 0, 0)) == {"right of"}, "the bound itself counts"
    assert relations(box(0, 0.001, 0, 0), box(0, 0, 0, 0)) == {"below"}


@given(*[st.floats(0, 50)] * 4, *[st.floats(1, 40)] * 4)
def test_relations_are_those_of_the_written_out_rule(ax, ay, bx, by, aw, ah, bw, bh):
    dx, dy = ax - bx, ay - by
    x = max(abs(dx) - 0.1 * (aw + bw), 0)
    y = max(abs(dy) - 0.1 * (ah + bh), 0)
    norm = (dx * dx + dy * dy) ** 0.5
    margins = [abs(x / norm - 0.5), abs(y / norm - 0.5)] if norm > 1e-6 else [0]
    if min(margins) < 1e-6 or min(abs(x - 1e-3), abs(y - 1e-3)) < 1e-6:
        return  # rounding decides
    expected = set()
    if x >= 1e-3 or y >= 1e-3:
        expected |= {"right of" if dx > 0 else "left of"} if x / norm > 0.5 else set()
        expected |= {"below" if dy > 0 else "above"} if y / norm > 0.5 else set()
    assert relations(box(ax, ay, aw, ah), box(bx, by, bw, bh)) == expected


LEFT = task(clause("a"), clause("b", position=["left of", 0]))
RED = task(clause("a", 2, color="red"))
CASES = {
    "nothing found": (task(clause("a")), {}, False, False, 0, 0),
    "found": (task(clause("a")), {"a": [thing()]}, True, True, 1, 1),
    "one too many": (task(clause("a")), {"a": [thing()] * 2}, True, False, 0, 0),
    "two of three": (task(clause("a", 3)), {"a": [thing()] * 2}, False, False, 2 / 3, 2 / 3),
    "others beside": (task(clause("a")), {"a": [thing()], "b": [thing()]}, True, True, 1, 1),
    "half of two": (task(clause("a"), clause("b")), {"b": [thing()]}, False, False, 0.5, 0.5),
    "excluded": (task(clause("a"), exclude=[clause("a", 2)]), {"a": [thing()] * 2}, False, False, 0, 0),
    "fewer than excluded": (task(clause("a"), exclude=[clause("a", 3)]), {"a": [thing()] * 2}, True, False, 0, 0),
    "one of two excluded": (task(clause("a"), exclude=[clause("b", 3), clause("c")]), {"a": [thing()], "c": [thing()]}, False, True, 1, 1),
    "red": (RED, {"a": [thing()] * 2}, True, True, 1, 1),
    "one is blue": (RED, {"a": [thing(), thing(color="blue")]}, False, False, 0.75, 0.75),
    "both are blue": (RED, {"a": [thing(color="blue")] * 2}, False, False, 0.5, 0.5),
    "the third is blue": (RED, {"a": [thing(), thing(), thing(color="blue")]}, True, False, 0.25, 0.25),
    "one red is missing": (RED, {"a": [thing()]}, False, False, 0.25, 0.25),
    "left": (LEFT, {"a": [thing(50)], "b": [thing()]}, True, True, 1, 1),
    "right instead": (LEFT, {"a": [thing()], "b": [thing(50)]}, False, False, 2 / 3, 3 / 4),
    "what it is left of is missing": (LEFT, {"b": [thing()]}, False, False, 1 / 3, 1 / 3),
    "what is left is missing": (LEFT, {"a": [thing()]}, False, False, 1 / 3, 1 / 3),
    "two are left": (LEFT, {"a": [thing(50)], "b": [thing(), thing(90)]}, True, False, 1 / 3, 1 / 3),
    "of two only one is left": (
        task(clause("a", 2), clause("b", position=["left of", 0])), {"a": [thing(50), thing(-50)], "b": [thing()]}, False, False, 2 / 3, 3 / 4,
    ),
    "both of two are left": (
        task(clause("a"), clause("b", 2, position=["left of", 0])), {"a": [thing(50)], "b": [thing(), thing(-9)]}, True, True, 1, 1,
    ),
    "the second of two is not left": (
        task(clause("a"), clause("b", 2, position=["left of", 0])), {"a": [thing(50)], "b": [thing(), thing(99)]}, False, False, 2 / 3, 3 / 4,
    ),
    "blue, and therefore in no place": (
        task(clause("a"), clause("b", color="red", position=["left of", 0])), {"a": [thing(50)], "b": [thing(color="blue")]}, False, False, 2 / 3, 2 / 3,
    ),
    "red and right instead": (
        task(clause("a"), clause("b", color="red", position=["left of", 0])), {"a": [thing(-50)], "b": [thing()]}, False, False, 3 / 4, 4 / 5,
    ),
    "the second of three is meant": (
        task(clause("a"), clause("b"), clause("c", position=["above", 1])), {"a": [thing(0, -90)], "b": [thing(0, 90)], "c": [thing()]}, True, True, 1, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts_worked_out_by_hand(case):
    asked, objects, loosely, exactly, part, published = CASES[case]
    assert lenient(objects, asked) is loosely
    assert strict(objects, asked) is exactly
    assert graded(objects, asked) == pytest.approx(part)
    assert graded(objects, asked, spurious_position_credit=True) == pytest.approx(published)


def test_the_credit_is_not_given_where_the_place_holds_or_what_it_names_is_unknown():
    wrong_reference = {"a": [thing()] * 2, "b": [thing(50)]}
    assert graded(wrong_reference, LEFT, spurious_position_credit=True) == pytest.approx((0 + 1 + 0) / 3)


def test_one_verdict_is_the_value_and_the_others_are_details():
    found, tasks = [{"a": [thing()] * 4}, {"a": [thing()]}], [task(clause("a"))] * 2
    expected = {"graded": [-2.0, 1.0], "lenient": [1.0, 1.0], "strict": [0.0, 1.0]}
    for verdict, values in expected.items():
        got = scores(found, tasks, verdict)
        assert got.value.tolist() == values
        assert {name: v.tolist() for name, v in got.details.items()} == {
            k: v for k, v in expected.items() if k != verdict
        }
    assert list(JUDGES) == ["graded", "lenient", "strict"]
    with pytest.raises(ValueError, match="argument 2"):
        scores(found[:1], tasks, "graded")


NO_LIST = "its 'include' or 'exclude' is no list of objects with a 'class' and a 'count' from 1"
NO_METADATA = "it has no GenEval metadata ('include') to judge by"


def no_place(position):
    return f"the position {position!r} is no relation and the number of an object before it"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, NO_METADATA), ({"exclude": []}, NO_METADATA),
        (task(clause("circle")), None), (task(clause("circle"), exclude=[]), None), (task(clause("circle"), exclude=[clause("square", 2)]), None),
        (task(), NO_LIST), ({"include": clause("circle")}, NO_LIST), ({"include": 5}, NO_LIST), (task("a"), NO_LIST), (task(clause(3)), NO_LIST),
        (task(clause("circle"), exclude=5), NO_LIST), (task(clause("circle"), exclude={"class": "a"}), NO_LIST),
        (task(clause("circle", 0)), NO_LIST), (task(clause("circle", 1.0)), NO_LIST), (task({"class": "a"}), NO_LIST), (task({"count": 1}), NO_LIST),
        (task(clause("circle"), "b"), NO_LIST), (task(clause("circle"), exclude=[clause("square", 0)]), NO_LIST),
        *((task(clause("circle"), clause("square", position=[r, 0])), None) for r in ("left of", "right of", "above", "below")),
        (task(clause("circle"), clause("square"), clause("triangle", position=["above", 1])), None),
        (task(clause("circle", position=None)), no_place(None)),
        (task(clause("circle"), clause("square", position=["above", False])), no_place(["above", False])), (task(clause("circle", True)), NO_LIST),
        (task(clause("circle", position=["above", 0])), no_place(["above", 0])),
        (task(clause("circle"), clause("square", position=["above", 1])), no_place(["above", 1])),
        (task(clause("circle"), clause("square", position=["above", -1])), no_place(["above", -1])),
        (task(clause("circle"), clause("square", position=["beside", 0])), no_place(["beside", 0])),
        (task(clause("circle"), clause("square", position=["above", "0"])), no_place(["above", "0"])),
        (task(clause("circle"), clause("square", position=["above"])), no_place(["above"])),
        (task(clause("circle"), clause("square", position="above")), no_place("above")),
    ],
)  # fmt: skip
def test_what_can_be_judged_and_why_the_rest_cannot(row, reason):
    assert metadata_problem(row) == reason
    assert Shapes().prompt_problem(row) == (None if reason is None else f"shapes: {reason}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (task(clause("circl")), "shapes: the detector knows no 'circl' (did you mean 'circle'?)"),
        (task(clause("circle"), exclude=[clause("dog", 2)]), "shapes: the detector knows no 'dog'"),
        (
            task(clause("circle", color="pink")),
            "shapes: 'pink' is none of the colours red, green, blue, yellow",
        ),
        (
            task(clause("circle", color=["red"])),
            "shapes: ['red'] is none of the colours red, green, blue, yellow",
        ),
        (task(clause("circle", color="red")), None),
    ],
)
def test_what_the_detector_of_shapes_can_never_find_is_no_prompt(row, reason):
    assert Shapes().prompt_problem(row) == reason


def test_the_shapes_reward_judges_each_image_by_its_own_task():
    assert (Shapes.range, Shapes().score, Shapes().higher_is_better) == ((0.0, 1.0), "graded", True)
    images = torch.full((2, 3, 64, 64), 0.9, dtype=torch.float64)
    images[0, :, 20:40, 20:40] = torch.tensor([214, 48, 49], dtype=torch.float64).view(3, 1, 1) / 255
    tasks = [task(clause("square", color="red")), task(clause("square", 2))]
    got = Shapes().load(CPU)(images, ["p", "q"], tasks)
    assert got.value.tolist() == [1.0, 0.0]
    assert {k: v.tolist() for k, v in got.details.items()} == {"lenient": [1, 0], "strict": [1, 0]}
    assert Shapes(score="strict").load(CPU)(images[:1], ["p"], tasks[1:]).details["graded"].tolist() == [0.5]
    with pytest.raises(ValueError, match=r"^prompt 'q' cannot be judged: shapes: it has no GenEval metadata"):
        Shapes().load(CPU)(images, ["p", "q"], [tasks[0], {}])
    with pytest.raises(ValueError, match="shorter"):
        Shapes().load(CPU)(images, ["p", "q"], tasks[:1])
    with pytest.raises(ValueError, match="shorter"):
        Shapes().load(CPU)(images[:1], ["p", "q"], tasks[:1])


def test_the_shapes_reward_is_never_below_0_and_geneval_is_as_published():
    images = torch.full((1, 3, 64, 64), 0.9, dtype=torch.float64)
    for left in (4, 24, 44):
        images[0, :, 20:34, left : left + 14] = (
            torch.tensor([214, 48, 49], dtype=torch.float64).view(3, 1, 1) / 255
        )
    one = task(clause("square"))
    for verdict in ("graded", "strict"):
        got = Shapes(score=verdict).load(torch.device("cpu"))(images, ["a square"], [one])
        assert got.value.tolist() == [0.0]
        assert min(values.item() for values in got.details.values()) == 0.0
    assert scores([{"square": [thing()] * 3}], [one], "graded").value.tolist() == [-1.0]
