"""A run folder is read field by field, and its sentences and figures are worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from posttrain.evaluation.intervals import paired_difference
from posttrain.evaluation.report.results import Results, StageResult, cost_texts, load_results
from posttrain.evaluation.report.verdict import Gain, difference, gain_of, verdict
from posttrain.support.wording import duration, short


def stage(name, values, higher=True, prompts=None, mean=None, score="s"):
    """A stage whose samples score ``values``, one prompt each unless ``prompts`` names them."""
    prompts = prompts or [f"p{i}" for i in range(len(values))]
    rows = [
        {"prompt": p, "index": i, "scores": {score: v}}
        for i, (p, v) in enumerate(zip(prompts, values, strict=True))
    ]
    average = sum(values) / len(values) if mean is None else mean
    summary = {"scores": {score: {"mean": average, "higher_is_better": higher}}}
    return StageResult(name, "sft", "base", card=summary, samples=rows)


def results(*stages):
    return Results("run", list(stages), "", {})


def test_a_stage_without_files_is_empty():
    empty = StageResult("a", None, None)
    assert (empty.account, empty.card, empty.samples, empty.metrics, empty.images) == ({}, {}, [], [], {})
    assert empty.scores == {}
    assert StageResult("a", None, None).card is not empty.card


def test_cards_are_found_by_the_name_of_the_stage():
    found = results(stage("base", [1]), stage("sft", [2]))
    assert found.cards == {"base": found.stages[0].card, "sft": found.stages[1].card}


def test_score_names_are_in_order_without_repeats():
    first, second = StageResult("a", None, None), StageResult("b", None, None)
    first.card, second.card = {"scores": {"z": {}, "a": {}}}, {"scores": {"m": {}, "z": {}}}
    assert results(first, second).score_names == ["z", "a", "m"]


def test_the_difference_pairs_equal_prompts_and_indices_with_the_score():
    base, other = (
        stage("base", [1.0, 2.0, 5.0, 0.0], prompts=["a", "a", "b", "c"]),
        stage("x", [2.0, 2.5, 9.0, 1.0], prompts=["a", "a", "b", "c"]),
    )
    groups = ["a", "a", "b", "c"]
    assert difference(base, other, "s") == paired_difference([1, 2, 5, 0], [2, 2.5, 9, 1], groups=groups)
    assert difference(base, other, "s")[0] == 1.625
    other.samples[0]["index"] = 7
    del other.samples[1]["scores"]["s"]
    del base.samples[2]["scores"]["s"]
    assert difference(base, other, "s") == (1.0, -math.inf, math.inf)
    other.samples.pop()
    assert difference(base, other, "s") is None


def test_the_pairs_of_one_prompt_are_drawn_together():
    base, other = (
        stage("base", [0.0] * 4, prompts=list("aabb")),
        stage("x", [1.0, 1.0, 3.0, 3.0], prompts=list("aabb")),
    )
    assert difference(base, other, "s") == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("change", "low", "high", "higher", "kind"),
    [
        (0.5, 0.25, 2, True, "better"), (0.5, 0.25, 2, False, "worse"), (-0.5, -2, -0.25, True, "worse"),
        (-0.5, -2, -0.25, False, "better"), (1, 0, 2, True, "same"), (-1, -2, 0, False, "same"), (0, 0, 0, True, "same"),
    ],
)  # fmt: skip
def test_a_gain_has_a_direction_where_its_interval_leaves_out_0(change, low, high, higher, kind):
    assert Gain(change, low, high, higher).kind == kind


def test_the_gain_of_a_stage_is_over_its_own_base():
    base, other, mine = stage("base", [0.0, 1.0]), stage("x", [0.5, 1.5]), stage("mine", [0.25, 1.25])
    found = Results("run", [base, other, mine], "", {}, {"x": mine})
    assert gain_of(found, other, "s") == Gain(0.25, 0.25, 0.25, True)
    assert gain_of(found, mine, "s") == Gain(0.25, 0.25, 0.25, True), (
        "over the first stage where nothing else is said"
    )
    assert gain_of(found, base, "s") is None
    assert gain_of(found, other, "t") is None
    del other.card["scores"]["s"]["higher_is_better"]
    assert gain_of(found, other, "s").kind == "better", "higher is the default"
    other.card["scores"]["s"]["higher_is_better"] = False
    assert gain_of(found, other, "s").kind == "worse"
    base.card["prompts"], mine.card["prompts"] = {"sha256": "a"}, {"sha256": "b"}
    assert gain_of(found, mine, "s") is None, "other prompts"
    mine.card["prompts"], mine.samples = {"sha256": "a"}, []
    assert gain_of(found, mine, "s") is None, "no sample in common"


def test_the_verdict_with_nothing_measured():
    assert verdict(results(StageResult("base", None, None))) == "Nothing has been evaluated."


def test_the_verdict_where_the_base_model_stays_best():
    words = verdict(results(stage("base", [0.5, 0.75]), stage("x", [0.25, 0.25])))
    assert words == "No stage beats the base model on s (0.625)."


def test_the_verdict_of_a_sure_gain():
    words = verdict(results(stage("base", [0.25, 0.5]), stage("x", [0.375, 0.625]), stage("y", [0.25, 0.25])))
    assert words == (
        "x scores best on s: 0.500, +0.125 against the base model "
        "(95 % interval +0.125 to +0.125, paired over prompts)."
    )


def test_the_verdict_of_a_sure_fall_where_lower_is_better():
    words = verdict(
        results(
            stage("base", [2.0, 3.0], False), stage("x", [1.0, 2.0], False), stage("y", [4.0, 4.0], False)
        )
    )
    assert words == (
        "x scores best on s: 1.500, -1.000 against the base model "
        "(95 % interval -1.000 to -1.000, paired over prompts)."
    )


@pytest.mark.parametrize(
    ("gains", "bounds"), [([-1.0, 3.0], "-1.000 to +3.000"), ([0.0, 2.0], "+0.000 to +2.000")]
)
def test_a_gain_whose_interval_holds_0_is_not_significant(gains, bounds):
    words = verdict(results(stage("base", [0.0, 0.0]), stage("x", gains)))
    assert words == (
        f"x scores best on s: 1.000, +1.000 against the base model (95 % interval {bounds}, "
        "paired over prompts), which is not significant."
    )


def test_a_fall_to_0_is_not_significant_where_lower_is_better():
    words = verdict(results(stage("base", [2.0, 0.0], False), stage("x", [0.0, 0.0], False)))
    assert "-2.000 to +0.000, paired over prompts), which is not significant." in words


def test_one_sample_does_not_tell_of_others():
    found = results(stage("base", [0.25]), stage("x", [0.75]))
    assert verdict(found) == (
        "x scores best on s: 0.750, +0.500 against the base model (of one sample), which is not significant."
    )
    gain = gain_of(found, found.stages[1], "s")
    assert (gain.kind, gain.known) == ("same", False)


def test_the_verdict_has_as_many_digits_as_the_table():
    words = verdict(results(stage("base", [1e-4, 3e-4]), stage("x", [2e-4, 7e-4])))
    assert words.startswith(
        "x scores best on s: 0.00045, +0.00025 against the base model (95 % interval +0.00010 to +0.00040"
    )


def test_a_base_model_of_another_run_is_no_stage():
    base, x, other, y = (
        stage("base", [0.25, 0.5]),
        stage("x", [0.5, 0.75]),
        stage("o", [1.0, 1.0]),
        stage("y", [0.0, 0.0]),
    )
    found = Results("runs", [base, x, other, y], "", {}, {"x": base, "o": other, "y": other})
    assert gain_of(found, other, "s") is None
    assert verdict(found) == "o scores best on s (1.000)."


def test_a_best_stage_without_pairs_is_told_by_its_mean_and_higher_is_the_default():
    base, other = stage("base", [0.25]), stage("x", [0.75], prompts=["another"])
    for one in (base, other):
        del one.card["scores"]["s"]["higher_is_better"]
    assert verdict(results(base, other)) == "x scores best on s (0.750)."


def test_a_stage_that_lacks_the_first_score_is_left_out():
    other = stage("t", [9.0], score="another")
    assert verdict(results(stage("base", [0.5]), other)) == (
        "Only the base model has been evaluated on s (0.500)."
    )
    assert verdict(results(StageResult("base", None, None), other)) == "t scores best on another (9.000)."


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "–"), (0, "", "0"), (7.0, "", "7"), (999, "", "999"), (999.9, "", "1k"), (999_900, "B", "1 MB"), (-999.7, "", "-1k"), (999.4, "", "999"), (0.12345, "", "0.123"),
        (12.5, "", "12.5"), (1000, "", "1k"), (55234, "", "55.2k"), (-2500, "", "-2.5k"), (-999, "", "-999"),
        (5, "B", "5 B"), (1.5e9, "B", "1.5 GB"), (2e6, "", "2M"), (3e12, "", "3T"), (4e15, "", "4P"), (5e18, "", "5E"),
        (6e21, "", "6Z"), (6e25, "", "6e+04Z"), (123456, "B", "123 kB"), (1234, "", "1.23k"),
    ],
)  # fmt: skip
def test_a_figure_has_three_digits_and_a_prefix(value, unit, text):
    assert short(value, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"), (0, "0 s"), (0.4, "< 1 s"), (1, "1 s"), (99.4, "99 s"), (99.9, "2 min"), (100, "2 min"), (89 * 60, "89 min"),
        (5969, "99 min"), (6000, "1 h 40 min"), (7260, "2 h 01 min"), (151, "3 min"), (359_969, "99 h 59 min"), (359_971, "4 days 4 h"),
        (432_000, "5 days 0 h"), (3_600 * 500 + 1_801, "20 days 21 h"),
    ],
)  # fmt: skip
def test_a_duration_is_in_the_unit_a_person_would_use(seconds, text):
    assert duration(seconds) == text


def test_the_cost_of_a_stage_is_told_in_five_figures_and_a_dash_is_what_was_not_measured():
    account = {
        "forward_equivalents": 1200, "images_per_second": 2.345, "peak_memory_bytes": 5e9, "steps": 30,
        "trainable_parameters": 7e6,
    }  # fmt: skip
    assert cost_texts(StageResult("a", None, None, account)) == ["1.2k", "2.3", "5 GB", "30", "7M"]
    assert cost_texts(StageResult("a", None, None, {"images_per_second": 0.0})) == ["–", "0.0", "–", "–", "–"]
    assert cost_texts(StageResult("a", None, None)) == ["–"] * 5


def test_a_run_folder_is_read_whole(tmp_path):
    rows = [
        {"name": "base", "algorithm": None, "parent": None},
        {"name": "x", "algorithm": "sft", "parent": "base"},
    ]
    (tmp_path / "run.json").write_text(json.dumps({"name": "demo", "stages": rows}))
    (tmp_path / "recipe.yaml").write_text("name: demo\n")
    (tmp_path / "environment.json").write_text('{"device": "cpu"}')
    grid = tmp_path / "x" / "evaluation" / "grid"
    grid.mkdir(parents=True)
    for name in ("001.png", "000.png", "note.txt"):
        (grid / name).touch()
    (tmp_path / "x" / "stage.json").write_text('{"steps": 3}')
    (tmp_path / "x" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (grid.parent / "eval.json").write_text(
        '{"scores": {"s": {"mean": 1, "low": 0, "high": 2}}, "grid_prompts": ["p", "q", "r"]}'
    )
    (grid.parent / "records.jsonl").write_text('{"prompt": "p", "index": 0, "scores": {}}\n')
    found = load_results(tmp_path)
    assert (found.name, found.recipe, found.environment) == ("demo", "name: demo\n", {"device": "cpu"})
    base, x = found.stages
    assert base == StageResult("base", None, None, environment={"device": "cpu"})
    assert (x.name, x.algorithm, x.parent, x.account) == ("x", "sft", "base", {"steps": 3})
    assert x.metrics == [{"step": 1, "loss": 0.5}]
    assert x.scores == {"s": {"mean": 1, "low": 0, "high": 2}}
    assert x.samples == [{"prompt": "p", "index": 0, "scores": {}}]
    assert x.images == {("p", 0): grid / "000.png", ("q", 0): grid / "001.png"}
    assert x.grids == {}


def test_images_and_grids_that_a_stage_kept_are_found(tmp_path):
    stages = [{"name": "x", "algorithm": "sft", "parent": "base"}]
    (tmp_path / "run.json").write_text(json.dumps({"stages": stages}))
    evaluation, samples = tmp_path / "x" / "evaluation", tmp_path / "x" / "samples"
    for file in ("grid/000.png", "images/a.png", "images/b.png"):
        (evaluation / file).parent.mkdir(parents=True, exist_ok=True)
        (evaluation / file).touch()
    samples.mkdir()
    for name in ("step-00000010.png", "step-00000002.png", "step-x.png", "other.png"):
        (samples / name).touch()
    rows = [
        {"prompt": "p", "index": i, "scores": {"s": i}, "image": f"images/{name}.png"}
        for i, name in enumerate(("a", "b", "gone"))
    ]
    (evaluation / "eval.json").write_text('{"scores": {}, "grid_prompts": ["p"]}')
    (evaluation / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (x,) = load_results(tmp_path).stages
    assert x.images == {("p", 0): evaluation / "grid/000.png", ("p", 1): evaluation / "images/b.png"}
    assert x.scored == {("p", 0): {"s": 0}, ("p", 1): {"s": 1}, ("p", 2): {"s": 2}}
    assert x.grids == {2: samples / "step-00000002.png", 10: samples / "step-00000010.png"}


def test_a_folder_without_a_run_is_empty_and_named_by_itself(tmp_path: Path):
    assert load_results(tmp_path / "mine") == Results("mine", [], "", {})


def test_what_a_stage_cost_has_a_dash_for_what_is_unknown():
    account = {
        "forward_equivalents": 1200, "images_per_second": 2.25, "peak_memory_bytes": 3e9,
        "steps": 40, "trainable_parameters": 5e6,
    }  # fmt: skip
    assert cost_texts(StageResult("a", None, None, account)) == ["1.2k", "2.2", "3 GB", "40", "5M"]
    assert cost_texts(StageResult("a", None, None)) == ["–"] * 5
