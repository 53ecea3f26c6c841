"""Evaluations are found, named and checked: what they share, and what was not measured alike."""

import json
from pathlib import Path

import pytest
from test_sharp_compare import CARD, records

from posttrain.errors import PosttrainError
from posttrain.evaluation.compare import EXPECTED, _names, load


def write(folder, rows, card):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(card))
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return folder


def test_folders_are_read_and_what_was_not_measured_alike_is_told(tmp_path):
    one, two = (
        records(("p", 0, 1.0, {}), ("q", 0, 2.0, {})),
        records(("q", 0, 5.0, {}), ("p", 0, 4.0, {}), ("r", 0, 0, {})),
    )
    card = CARD | {
        "sampler": {"steps": 4, "batch_size": 2},
        "shown": {"grid": 1},
        "model": {"weights": "raw", "sha256": "a"},
    }
    card["model"]["settings"] = {"type": "sd3", "revision": "main"}
    write(tmp_path / "one" / "evaluation", one, card)
    other = json.loads(json.dumps(card))
    other["sampler"] = {"steps": 5, "batch_size": 9}
    other["model"] = {"weights": "ema", "sha256": "b", "settings": {"type": "flux", "revision": "x"}}
    other["shown"]["grid"] = 9
    write(tmp_path / "two", two, other)
    found = load([tmp_path / "one", tmp_path / "two", tmp_path / "two"][:2])
    assert [e.name for e in found.evaluations] == ["one", "two"]
    assert [e.folder for e in found.evaluations] == [tmp_path / "one" / "evaluation", tmp_path / "two"]
    assert found.evaluations[1].records == two
    assert found.keys == [("p", 0), ("q", 0)]
    assert found.remarks == [
        "compared on the 2 samples that all have (2 in one, 3 in two)",
        "one and two were not measured alike: sampler.steps (one: 4, two: 5)",
    ]
    assert load([tmp_path / "two", tmp_path / "one"]).remarks[0].endswith("(3 in two, 2 in one)")
    write(tmp_path / "two", one, card)
    assert load([tmp_path / "one", tmp_path / "two"]).remarks == []


def test_differences_in_two_places_stand_in_one_remark(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    for name, steps in (("a", 1), ("b", 2), ("c", 2)):
        write(tmp_path / name, rows, CARD | {"steps": steps, "seed": steps})
    remarks = load([tmp_path / n for n in "abc"]).remarks
    assert remarks == [
        f"a and {n} were not measured alike: steps (a: 1, {n}: 2); seed (a: 1, {n}: 2)" for n in "bc"
    ]


def test_what_may_differ_is_listed():
    assert EXPECTED == (
        "model.weights",
        "model.sha256",
        "model.settings.type",
        "model.settings.revision",
        "shown",
        "sampler.batch_size",
    )


def test_what_cannot_be_compared_is_refused(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    first = write(tmp_path / "run" / "evaluation", rows, CARD)
    with pytest.raises(PosttrainError, match=r"^compare needs two evaluations or more$"):
        load([first])
    with pytest.raises(PosttrainError, match=r"^'.*none' holds no finished evaluation \(no eval\.json\)$"):
        load([first, tmp_path / "none"])
    with pytest.raises(
        PosttrainError, match=r"^the evaluations share no sample: other prompts, or other image numbers$"
    ):
        load([first, write(tmp_path / "b", records(("p", 1, 1.0, {})), CARD)])
    with pytest.raises(PosttrainError, match=r"^the evaluations share no score$"):
        load([first, write(tmp_path / "c", rows, {"scores": {"t": {}}})])
    with pytest.raises(PosttrainError, match=r"^compare was given one folder twice$"):
        load([first, tmp_path / "run"])


def test_names_are_as_long_as_needed_to_differ(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    folders = [write(tmp_path / name / "sft" / "evaluation", rows, CARD) for name in ("x", "y")]
    assert [e.name for e in load(folders).evaluations] == ["x/sft", "y/sft"]


def test_names_of_paths_of_different_lengths():
    assert _names([Path("/c"), Path("/a/x/y"), Path("/b/x/y")]) == ["//c", "a/x/y", "b/x/y"]
    assert _names([Path("/b/c"), Path("/a/b/c/evaluation")])[1] == "a/b/c"


def test_what_one_of_three_lacks_is_compared_in_none(tmp_path):
    rows = records(("p", 0, 1.0, {}), ("q", 0, 2.0, {}), ("r", 0, 3.0, {}))
    for name, left in (("a", ()), ("b", ("p",)), ("c", ("q",))):
        kept = {key: row for key, row in rows.items() if key[0] not in left}
        write(
            tmp_path / name,
            kept,
            {"scores": {s: {} for s in ("x", "s", "low") if s != {"b": "x", "c": "low"}.get(name)}},
        )
    found = load([tmp_path / name for name in "abc"])
    assert found.keys == [("r", 0)]
    assert found.scores == ["s"]
