import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.engine.tracker import METRICS, MetricsFile, Tracker, read_metrics


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / METRICS


def write(path, steps, **options):
    file = MetricsFile(path, **options)
    for step in steps:
        file.log(step, {"loss": step / 10})
    file.close()


def test_each_step_is_one_object_readable_before_the_file_is_closed(path):
    file = MetricsFile(path)
    file.log(1, {"loss": 0.5, "grad_norm": 2.0})
    (row,) = strict(path.read_text())
    assert row.pop("time") >= 0
    assert row == {"step": 1, "loss": 0.5, "grad_norm": 2.0}
    file.log(2, {"loss": 0.25})
    assert [r["loss"] for r in read_metrics(path)] == [0.5, 0.25]
    file.close()


def test_what_is_not_finite_stays_valid_json_and_is_read_back(path):
    file = MetricsFile(path)
    file.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    file.close()
    (row,) = strict(path.read_text())
    assert (row["a"], row["b"], row["c"], row["d"]) == ("nan", "inf", "-inf", 1.0)
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("value", [np.float32(1.5), np.float64(1.5), torch.tensor(1.5)])
def test_scalars_of_numpy_and_torch_are_numbers(path, value):
    file = MetricsFile(path)
    file.log(1, {"loss": value})
    file.close()
    assert strict(path.read_text())[0]["loss"] == 1.5


def test_resume_drops_the_steps_after_it_and_goes_on(path):
    write(path, range(1, 7))
    write(path, [5, 6, 7], resume_step=4)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_without_a_resume_step_the_file_starts_empty(path):
    write(path, range(1, 7))
    write(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_a_resume_keeps_the_rows_that_the_checkpoint_counted(path):
    """A reading of step 4 came after the checkpoint of step 4: it is taken again."""
    file = MetricsFile(path)
    for step in (0, 1, 2, 3, 4):
        file.log(step, {"loss": step / 10})
    counted = file.on_disk()
    file.log(4, {"heldout/shapes": 1.0})
    file.log(5, {"loss": 0.5})
    file.close()
    assert counted == 5
    file = MetricsFile(path, resume_step=4, rows=counted)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]
    file.log(4, {"heldout/shapes": 1.0})
    assert file.on_disk() == 6
    file.close()
    MetricsFile(path, resume_step=0, rows=0).close()
    assert read_metrics(path) == [], "also what belongs to step 0"


def test_a_line_that_was_left_out_lets_no_later_row_take_its_place(path):
    write(path, range(1, 7))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))  # as mended
    MetricsFile(path, resume_step=4, rows=4).close()
    assert [row["step"] for row in read_metrics(path)] == [2, 3, 4]


def test_a_torn_last_line_is_dropped_and_the_next_starts_on_its_own(path):
    write(path, [1, 2])
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "time": 0.1, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    write(path, [3], resume_step=3)
    assert [row["step"] for row in strict(path.read_text())] == [1, 2, 3]


def test_time_goes_on_after_a_resume(path):
    write(path, [1])
    path.write_text('{"step": 1, "time": 500.0, "loss": 1.0}\n')
    write(path, [2], resume_step=1)
    assert 500 <= read_metrics(path)[1]["time"] < 510


def test_resuming_leaves_no_half_written_file(path):
    write(path, range(1, 7))
    write(path, [5], resume_step=4)
    assert [p.name for p in path.parent.iterdir()] == [METRICS]


def test_a_file_that_is_not_there_has_no_rows(path):
    assert read_metrics(path) == []


def test_without_tensorboard_only_the_metrics_file_is_written(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.image("samples", 1, Image.new("RGB", (4, 4)))
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]
    assert read_metrics(tmp_path / METRICS)[0]["loss"] == 1.0


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps in ((0, [1, 2, 3, 4]), (2, [3, 4, 5])):
        with Tracker(tmp_path, resume_step=resume) as tracker:
            for step in steps:
                tracker.log(step, {"loss": step + 100.0 * resume})
            tracker.image("samples", steps[-1], Image.new("RGB", (6, 4), "red"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 203),
        (4, 204),
        (5, 205),
    ]
    assert (events.Images("samples")[-1].width, events.Images("samples")[-1].height) == (6, 4)
    assert [row["loss"] for row in read_metrics(tmp_path / METRICS)] == [1, 2, 203, 204, 205]


def test_a_histogram_is_of_the_finite_values(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {}, {"some": [1.0, math.nan, 3.0, math.inf], "none": [math.nan]})
    (row,) = read_metrics(tmp_path / METRICS)
    assert (row["some"]["low"], row["some"]["high"], sum(row["some"]["counts"])) == (1, 3, 2)
    assert sum(row["none"]["counts"]) == 0
