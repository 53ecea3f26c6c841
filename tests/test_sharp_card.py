"""A result card says what was measured, and its scores are worked out by hand."""

import hashlib
import json

import pytest

from posttrain.errors import RewardError
from posttrain.evaluation import card as module
from posttrain.evaluation.card import card, differing, other_settings, other_weights, result, summaries
from posttrain.evaluation.intervals import bootstrap_interval
from posttrain.recipe.schema import Evaluation
from posttrain.rewards.jpeg import JpegCompressibility
from posttrain.stages.stage_evaluation import _reason_against
from posttrain.support.versions import versions

JPEG = JpegCompressibility()
NAME = JPEG.label


class Drawn:
    """What a card needs of a sampler."""

    source, settings = "folder", {"type": "toy"}

    def fingerprint(self):
        return "abc"


def record(prompt, index, value, tag=None, **details):
    return {
        "prompt": prompt,
        "index": index,
        "tag": tag,
        "scores": {NAME: value, **{f"{NAME}/{k}": v for k, v in details.items()}},
    }


def test_the_card_before_the_first_sample(monkeypatch):
    rows = [{"prompt": "é", "tag": "x"}, {"tag": "y", "prompt": "b"}, {"prompt": "b"}]
    digest = hashlib.sha256(
        b'{"prompt": "\\u00e9", "tag": "x"}\n{"prompt": "b", "tag": "y"}\n{"prompt": "b"}\n'
    ).hexdigest()
    monkeypatch.setattr(module, "published_as", lambda sha256: "suite" if sha256 == digest else None)
    evaluation = Evaluation.model_validate(
        {
            "prompts": {"type": "shapes", "count": 6},
            "rewards": ["jpeg_compressibility"],
            "grid": 3,
            "keep": "png",
            "seed": 7,
            "steps": 5,
        }
    )
    found = card(Drawn(), evaluation, rows, "ema")
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["format", "prompts", "model", "sampler", "shown", "scorers", "versions"]
    assert found["format"] == 1
    prompts = evaluation.prompts.model_dump(mode="json")
    assert prompts["count"] == 6
    assert found["prompts"] == prompts | {"rows": 3, "distinct": 2, "sha256": digest, "published_as": "suite"}
    assert found["model"] == {
        "source": "folder",
        "weights": "ema",
        "settings": {"type": "toy"},
        "sha256": "abc",
    }
    assert found["shown"] == {"grid": 3, "keep": "png"}
    assert (found["sampler"]["seed"], found["sampler"]["steps"], found["sampler"]["images_per_prompt"]) == (
        7,
        5,
        1,
    )
    assert not {"prompts", "rewards", "grid", "keep"} & set(found["sampler"])
    assert found["scorers"] == {NAME: {"type": NAME, "weights": {}}}
    assert found["versions"] == versions(("posttrain", "torch", "diffusers", "transformers"))
    assert set(found["versions"]) == {"python", "posttrain", "torch", "diffusers", "transformers"}


def test_the_prompts_file_is_named_in_json(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    rewards = {
        "prompts": {"type": "file", "path": str(tmp_path / "p.txt")},
        "rewards": ["jpeg_compressibility"],
    }
    found = card(Drawn(), Evaluation.model_validate(rewards), [{"prompt": "a"}], "ema")
    assert found["prompts"]["path"] == str(tmp_path / "p.txt")
    assert found["prompts"]["published_as"] is None


def test_the_summary_of_a_score_and_of_its_details():
    rows = [record("a", 0, 1.0, part=0.0), record("a", 1, 3.0, part=1.0), record("b", 0, 8.0, part=1.0)]
    found = summaries(rows, [JPEG])
    low, high = bootstrap_interval([1.0, 3.0, 8.0], groups=["a", "a", "b"])
    assert found[NAME] == {"mean": 4.0, "low": low, "high": high, "count": 3, "higher_is_better": True}
    assert list(found) == [NAME, f"{NAME}/part"]
    assert found[f"{NAME}/part"]["mean"] == pytest.approx(2 / 3)
    assert (low, high) == (2.0, 8.0)


def test_the_direction_is_the_rewards_own():
    class Lower:
        label, higher_is_better = "cost", False

    rows = [{"prompt": "a", "tag": None, "scores": {"cost/part": 1.0, NAME: 2.0}}]
    found = summaries(rows, [JPEG, Lower()])
    assert (found["cost/part"]["higher_is_better"], found[NAME]["higher_is_better"]) == (False, True)


def test_the_mean_of_tags_weighs_each_tag_alike():
    rows = [record("a", 0, 0.0, "x"), record("b", 0, 1.0, "y"), record("c", 0, 3.0, "y"), record("d", 0, 9.0)]
    found = result(rows, [JPEG])
    assert list(found) == ["images", "scores", "tags", "tag_means"]
    assert found["images"] == 4
    assert found["scores"] == summaries(rows, [JPEG])
    assert found["tags"] == {"x": summaries(rows[:1], [JPEG]), "y": summaries(rows[1:3], [JPEG])}
    assert list(found["tags"]) == ["x", "y"]
    assert found["tag_means"] == {NAME: 1.0}, "0 and 2; what has no tag does not count"


def test_a_detail_that_some_images_lack_is_an_error_that_names_it():
    rows = [record("a", 0, 0.0, "x"), record("b", 0, 1.0, "y", part=1.0)]
    with pytest.raises(RewardError, match=rf"no score '{NAME}/part' for 1 image, the first of 'a'"):
        result(rows, [JPEG])


def test_without_tags_there_is_no_mean_of_them():
    found = result([record("a", 0, 1.0)], [JPEG])
    assert (found["tags"], found["tag_means"]) == ({}, {})
    assert result([record("a", 0, 1.0, "x")], [JPEG])["tag_means"] == {NAME: 1.0}


def test_cards_differ_by_place_and_value():
    before = {"a": {"b": 1, "c": 2}, "d": [1], "e": {"x": 1}}
    now = {"a": {"b": 1, "c": 3}, "d": [1], "e": 5, "f": None, "g": 0}
    assert differing(before, now) == ["a.c (was 2, now 3)", "e (was {'x': 1}, now 5)", "g (was None, now 0)"]
    assert differing(now, before)[1:] == ["e (was 5, now {'x': 1})", "g (was 0, now None)"]
    assert differing(before, before) == []


def test_what_may_differ_between_two_tries_is_no_difference():
    before = {
        "versions": {"torch": "1"},
        "model": {"source": "x", "sha256": "a"},
        "prompts": {"path": "p", "versions": 1},
    }
    now = {
        "versions": {"torch": "2"},
        "model": {"source": "y", "sha256": "a"},
        "prompts": {"path": "q", "versions": 2},
    }
    assert differing(before, now) == ["prompts.versions (was 1, now 2)"]
    results = ("images", "scores", "tags", "tag_means", "forward_equivalents", "seconds", "grid_prompts")
    assert differing(dict.fromkeys(results, 1), dict.fromkeys(results, 2)) == []
    assert differing({"model": {"images": 1}}, {"model": {"images": 2}}) == ["model.images (was 1, now 2)"]


def test_an_evaluation_is_compared_with_a_card_by_its_settings_but_not_by_any_weights():
    def evaluation(**fields):
        given = {"prompts": {"type": "shapes", "count": 6}, "rewards": ["jpeg_compressibility"], **fields}
        return Evaluation.model_validate(given)

    rows = [{"prompt": "a"}, {"prompt": "b"}]
    before = card(Drawn(), evaluation(), rows, "ema")
    before["scorers"][NAME]["weights"] = {"file": "a"}
    before |= {"model": {}, "versions": {}, "scores": {}}
    assert other_settings(before, evaluation(), rows) == []
    assert other_settings(before, evaluation(steps=9), rows) == ["sampler.steps (was 40, now 9)"]
    assert other_settings(before, evaluation(grid=9), rows) == ["shown.grid (was 8, now 9)"]
    assert other_settings(before, evaluation(grid=9), rows, ["shown"]) == []
    assert other_settings(before, evaluation(batch_size=9), rows, ["sampler.batch_size"]) == []
    fewer = other_settings(before, evaluation(), rows[:1])
    assert fewer[:2] == ["prompts.rows (was 2, now 1)", "prompts.distinct (was 2, now 1)"]
    (other,) = other_settings(before, evaluation(rewards=["jpeg_incompressibility"]), rows)[:1]
    assert other.startswith(
        "scorers.jpeg_compressibility (was {'type': 'jpeg_compressibility', 'weights': None}, now None"
    )
    before["prompts"] = before["prompts"] | {"path": "elsewhere"}
    assert other_settings(before, evaluation(), rows) == []


def test_other_weights_of_a_reward_are_told_by_their_hashes(tmp_path):
    def evaluation(folder):
        reward = {"type": "pickscore", "path": str(tmp_path / folder), "processor": str(tmp_path / "a")}
        return Evaluation.model_validate({"prompts": {"type": "shapes", "count": 2}, "rewards": [reward]})

    for folder, content in (("a", "1"), ("copy", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
            (tmp_path / folder / name).write_text("{}")
        (tmp_path / folder / "model.safetensors").write_text(content)
    rows = [{"prompt": "a"}]
    before = {
        **card(Drawn(), evaluation("a"), rows, "ema"),
        "images": 0,
        "scores": {},
        "tags": {},
        "tag_means": {},
    }
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    for folder, name in ((begun, "claim.json"), (finished, "eval.json")):
        folder.mkdir()
        (folder / name).write_text(json.dumps(before))
        (folder / "records.jsonl").touch()
        assert _reason_against(folder, evaluation("copy"), rows) is None
        assert ".path.model.safetensors (was" in _reason_against(folder, evaluation("b"), rows)
    assert [*other_weights(before, evaluation("a"))] == [*other_weights(before, evaluation("copy"))] == []
    (line,) = other_weights(before, evaluation("b"))
    assert line.startswith("scorers.pickscore.weights.path.model.safetensors (was '6b86b273")
    assert [*other_weights(before, evaluation("gone"))] == [], "they are not here"
    del before["scorers"]["pickscore"]["weights"]["path"]["model.safetensors"]
    assert [*other_weights(before, evaluation("b"))] == [], "an earlier version did not list the file"
    before["scorers"]["pickscore"] = {}
    assert [*other_weights(before, evaluation("b"))] == []
    assert [*other_weights({"scorers": {}}, evaluation("b"))] == []


def test_another_source_of_a_function_is_told_as_other_weights_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_judge.py"
    file.write_text("def light(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    block = {"prompts": {"type": "shapes", "count": 2}, "rewards": ["own_judge:light"]}
    evaluation, rows = Evaluation.model_validate(block), [{"prompt": "a"}]
    before = {
        **card(Drawn(), evaluation, rows, "ema"),
        "images": 0,
        "scores": {},
        "tags": {},
        "tag_means": {},
    }
    (tmp_path / "eval.json").write_text(json.dumps(before))
    (tmp_path / "records.jsonl").touch()
    assert _reason_against(tmp_path, evaluation, rows) is None
    file.write_text(file.read_text().replace("mean", "amax"))
    assert "scorers.light.weights.source.own_judge (was '" in _reason_against(tmp_path, evaluation, rows)
    file.unlink()
    assert _reason_against(tmp_path, evaluation, rows) is None, "it is not here"
