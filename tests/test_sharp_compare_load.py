"""Evaluations are found, named and checked: what they share, and what was not measured alike."""

import json
from pathlib import Path

import pytest
from test_sharp_compare import CARD, records

from posttrain.errors import PosttrainError
from posttrain.evaluation.compare import EXPECTED, load
from posttrain.evaluation.likeness import other_base, unlike
from posttrain.evaluation.names import distinct_names


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


def with_base(**base):
    return CARD | {"model": {"base": base}}


def test_models_of_two_bases_are_told_apart_by_their_components(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    one = with_base(vae="1", transformer="2", text="3")
    cards = {"a": one, "b": with_base(vae="9", transformer="2", tokenizer="4"), "c": CARD, "d": one}
    for name, card in cards.items():
        write(tmp_path / name, rows, card)
    assert load([tmp_path / n for n in "abd"]).remarks == [
        "a and b were made from two base models: text, tokenizer, vae differ"
    ]
    assert other_base(one, with_base()) == other_base(with_base(), one) == other_base(CARD, one) == []


def test_evaluations_of_a_run_that_may_not_be_compared_are_told():
    card = with_base(vae="1") | {
        "prompts": {"sha256": "p"},
        "sampler": {"steps": 4, "batch_size": 2},
        "scorers": {"s": {}},
    }
    free = card | {"sampler": {"steps": 4, "batch_size": 9}, "versions": {"torch": "9"}}
    assert [*unlike({"base": {}, "a": card, "b": free, "c": {}})] == []
    assert [*unlike({})] == []
    others = {
        "p": card | {"prompts": {"sha256": "q"}},
        "s": card | {"sampler": {"steps": 5, "batch_size": 2}},
        "r": card | {"scorers": {"s": {"weights": {"path": "x"}}}},
        "v": card | with_base(vae="2"),
        "all": with_base(vae="2") | {"prompts": {}, "sampler": {}, "scorers": {}},
    }
    assert [*unlike({"base": card, **others, "last": card})] == [
        "p was evaluated on other prompts than base: do not compare their scores.",
        "s was evaluated with other sampling settings than base: do not compare their scores.",
        "r was evaluated by other rewards than base: do not compare their scores.",
        "v was evaluated on another base model (vae differ) than base: do not compare their scores.",
        "all was evaluated on other prompts and with other sampling settings and by other rewards and "
        "on another base model (vae differ) than base: do not compare their scores.",
    ]


def test_what_may_differ_is_listed():
    assert EXPECTED == (
        "model.weights",
        "model.sha256",
        "model.settings.type",
        "model.settings.revision",
        "shown",
        "sampler.batch_size",
        "model.base",
    )


def test_what_cannot_be_compared_is_refused(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    first = write(tmp_path / "run" / "evaluation", rows, CARD)
    with pytest.raises(PosttrainError, match=r"^compare needs two evaluations or more$"):
        load([first])
    with pytest.raises(PosttrainError, match=r"^'.*none' holds no finished evaluation \(no eval\.json\)$"):
        load([first, tmp_path / "none"])
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "run.json").write_text("{}")
    with pytest.raises(PosttrainError, match=r"\(no eval\.json\): 'posttrain report' compares runs$"):
        load([first, tmp_path / "several"])
    with pytest.raises(
        PosttrainError, match=r"^the evaluations share no sample: other prompts, or other image numbers$"
    ):
        load([first, write(tmp_path / "b", records(("p", 1, 1.0, {})), CARD)])
    with pytest.raises(PosttrainError, match=r"^the evaluations share no score$"):
        load([first, write(tmp_path / "c", rows, {"scores": {"t": {}}})])
    with pytest.raises(PosttrainError, match=r"^one folder was given twice$"):
        load([first, tmp_path / "run"])


def test_names_are_as_long_as_needed_to_differ(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    folders = [write(tmp_path / name / "sft" / "evaluation", rows, CARD) for name in ("x", "y")]
    assert [e.name for e in load(folders).evaluations] == ["x/sft", "y/sft"]


def test_names_of_paths_of_different_lengths():
    assert distinct_names([Path("/c"), Path("/a/x/y"), Path("/b/x/y")]) == ["//c", "a/x/y", "b/x/y"]
    assert distinct_names([Path("/b/c"), Path("/a/b/c/evaluation")])[1] == "a/b/c"


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
