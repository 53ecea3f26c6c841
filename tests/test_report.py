"""The report says what the records say, alone and offline."""

import itertools
import json
import math

import numpy as np
import pytest
from html_page import checked
from PIL import Image
from rich.console import Console

from posttrain.engine.tracker import Tracker, read_metrics
from posttrain.errors import PosttrainError
from posttrain.evaluation.intervals import bootstrap_interval, paired_difference
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.results import load_results
from posttrain.evaluation.report.table import table
from posttrain.evaluation.report.verdict import verdict
from posttrain.support.images import grid, to_pil
from posttrain.support.wording import counted, duration, short

EVIL = 'a <script>alert(1)</script> & "quoted" prompt'


def write_stage(folder, values, account=True):
    evaluation = folder / "evaluation"
    (evaluation / "grid").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(evaluation / "grid" / "000.png")
    low, high = bootstrap_interval(values)
    score = {
        "mean": float(np.mean(values)),
        "low": low,
        "high": high,
        "count": len(values),
        "higher_is_better": True,
    }
    summary = {"scores": {"shapes": score}, "tags": {"counting": {"shapes": score}}, "grid_prompts": [EVIL]}
    (evaluation / "eval.json").write_text(json.dumps(summary))
    rows = [
        {"prompt": f"p{i}", "index": 0, "tag": None, "scores": {"shapes": v}} for i, v in enumerate(values)
    ]
    (evaluation / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if account:
        cost = {
            "steps": 20,
            "forward_equivalents": 55234,
            "images_per_second": 12.34,
            "peak_memory_bytes": 1.5e9,
        }
        (folder / "stage.json").write_text(
            json.dumps(cost | {"trainable_parameters": 3_000_000, "seconds": 90.0})
        )
        with Tracker(folder, tensorboard=False) as tracker:
            for step in range(1, 21):
                tracker.log(step, {"loss": 2 / step, "grad_norm": 1.0})


@pytest.fixture
def run(tmp_path):
    names = ["base", "better", "same", "missing"]
    stages = [{"name": n, "parent": "base", "algorithm": "sft"} for n in names]
    (tmp_path / "run.json").write_text(json.dumps({"name": "demo", "stages": stages}))
    (tmp_path / "recipe.yaml").write_text("name: demo # <b>\n")
    rng = np.random.default_rng(0)
    base = rng.random(50)
    write_stage(tmp_path / "base", base.tolist(), account=False)
    write_stage(tmp_path / "better", (base + 0.2 + 0.1 * rng.standard_normal(50)).tolist())
    write_stage(tmp_path / "same", (base + 0.3 * rng.standard_normal(50)).tolist())
    return tmp_path


def test_the_page_shows_the_numbers_of_the_records(run):
    page, results = write_report(run).read_text(), load_results(run)
    for stage in results.stages[:3]:
        assert f"{stage.scores['shapes']['mean']:.3f}" in page
    assert "55.2k" in page
    assert "1.5 GB" in page
    assert "not significant" in page


def test_the_verdict_names_the_best_stage_and_its_paired_gain(run):
    results = load_results(run)
    words = verdict(results)
    assert words.startswith("better scores best on shapes")
    assert "not significant" not in words
    results.stages.pop(1)
    assert "not significant" in verdict(results) or "No stage beats" in verdict(results)


def test_a_run_with_nothing_in_it_yet_still_has_a_report(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "empty"}')
    assert (
        "Nothing has been evaluated" in checked(write_report(tmp_path).read_text("utf-8")).one("header").text
    )


def test_a_folder_without_a_run_has_no_report(tmp_path):
    with pytest.raises(PosttrainError, match=r"holds no run \(no run.json\)"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_table_shows_every_stage_uncut(run, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(table(run, width))
    text = console.export_text()
    for word in ("base", "better", "same", "missing", "55.2k", "12.3"):
        assert word in text
    assert "…" not in text


def test_metrics_are_json_even_when_they_are_not_finite_and_resume_drops_the_future(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": float("nan") if step == 2 else 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[1]["loss"])
    with Tracker(tmp_path, resume_step=2, tensorboard=False) as tracker:
        tracker.log(3, {"loss": 5.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] == 5.0
    assert all(a["time"] <= b["time"] for a, b in itertools.pairwise(rows))


def test_tensorboard_gets_scalars_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, tensorboard=True) as tracker:
        tracker.log(7, {"loss": 0.5})
        tracker.image("samples", 7, Image.new("RGB", (8, 8)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 0.5)]
    assert [e.step for e in events.Images("samples")] == [7]


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.normal(3, 1, 60), resamples=300)
        hits += low <= 3 <= high
    assert 0.90 < hits / 300 < 0.98


def test_a_bootstrap_over_groups_is_wider_where_members_agree():
    rng = np.random.default_rng(0)
    values, groups = np.repeat(rng.normal(size=30), 8), np.repeat(np.arange(30), 8)
    low, high = bootstrap_interval(values)
    wide_low, wide_high = bootstrap_interval(values, groups=groups)
    assert wide_high - wide_low > 2 * (high - low)


def test_pairing_sees_a_gain_that_the_spread_hides():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 5, 100)
    mean, low, high = paired_difference(a, a + 0.5)
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("values", [[], [[1.0]]])
def test_a_bootstrap_of_nothing_is_an_error(values):
    with pytest.raises(ValueError, match="needs a list"):
        bootstrap_interval(values)


def test_images_are_rounded_not_cut_off():
    import torch

    image = torch.full((1, 3, 2, 2), 0.999)
    assert to_pil(image)[0].getpixel((0, 0)) == (255, 255, 255)
    sheet = grid(torch.rand(3, 3, 64, 64), 2, captions=["one", "two", "three"])
    assert sheet.width > 2 * 128
    assert sheet.height > 2 * 128


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (950, "950"), (55234, "55.2k"), (3e6, "3M"), (0, "0")]
)
def test_figures_are_short(value, shown):
    assert short(value) == shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "–"),
        (0.2, "< 1 s"),
        (45.4, "45 s"),
        (1580, "26 min"),
        (5_940, "99 min"),
        (12_030, "3 h 20 min"),
    ],
)
def test_durations_are_as_a_person_says_them(seconds, said):
    assert duration(seconds) == said


def test_one_is_counted_without_a_plural():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
