"""GenEval's rules give the recorded verdicts, and hold in general."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity_vectors import FOLDER

from posttrain.rewards._geneval import graded, lenient, relations, strict

ROWS = [json.loads(line) for line in (FOLDER / "geneval_judge.jsonl").read_text().splitlines()]
BOX = st.tuples(*[st.floats(0, 100)] * 2, *[st.floats(1, 50)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


def test_parity_geneval_judge():
    assert ROWS
    for row in ROWS:
        objects, task = row["objects"], row["metadata"]
        assert lenient(objects, task) is row["correct"], task["prompt"]
        assert strict(objects, task) is row["strict_correct"], task["prompt"]
        assert graded(objects, task) == pytest.approx(row["score"], abs=1e-9), task["prompt"]
        reference = graded(objects, task, spurious_position_credit=True)
        assert reference == pytest.approx(row["score_reference"], abs=1e-9), task["prompt"]


@given(BOX, BOX)
def test_relations_are_antisymmetric(a, b):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(a, b) == {opposite[r] for r in relations(b, a)}


def thing(x, y, color="red"):
    return {"box": [x, y, x + 10, y + 10], "score": 0.9, "color": color}


def test_a_violated_position_scores_two_thirds_not_three_quarters():
    task = {"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["left of", 0]}]}
    wrong = {"a": [thing(0, 0)], "b": [thing(50, 0)]}
    assert graded(wrong, task) == pytest.approx(2 / 3)
    assert graded(wrong, task, spurious_position_credit=True) == pytest.approx(3 / 4)
    assert not strict(wrong, task)
    assert not lenient(wrong, task)
    right = {"a": [thing(50, 0)], "b": [thing(0, 0)]}
    assert graded(right, task) == 1
    assert strict(right, task)
    assert lenient(right, task)


def test_the_graded_score_of_too_many_objects_is_negative():
    task = {"include": [{"class": "a", "count": 1}], "exclude": [{"class": "a", "count": 2}]}
    many = {"a": [thing(0, 0)] * 4}
    assert graded(many, task) == -2
    assert not lenient(many, task)


@given(st.integers(1, 4), st.integers(0, 6))
def test_strict_implies_a_graded_score_of_1(count, found):
    task = {"include": [{"class": "a", "count": count, "color": "red"}]}
    objects = {"a": [thing(10 * i, 0) for i in range(found)]}
    assert strict(objects, task) is (count == found)
    assert (graded(objects, task) == 1) is (count == found)
