"""The status of a run is what its folder holds, at any moment of the run."""

import json
import os

import pytest
from forked import posttrain
from runs import EVALUATION, cut_off_after, recipe, run_quietly, stage

from posttrain.cli.status import in_words, lines_of
from posttrain.errors import DamagedError, PosttrainError
from posttrain.stages.status import RunStatus, StageStatus, status_of
from posttrain.support.files import locked

MONITOR = {"monitor": "{every: 2, prompts: 3}"}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run of two stages that a kill ended after step 5 of the first."""
    folder = tmp_path_factory.mktemp("status") / "small"
    made = recipe(stage("sft", **MONITOR), stage("more"), evaluation=EVALUATION)
    cut_off_after(5, made, folder, pytest.MonkeyPatch())
    return folder


def test_a_run_that_was_killed(cut):
    status = status_of(cut)
    assert (status.name, status.running, status.finished) == ("small", False, False)
    base, sft, more = status.stages
    assert (base.name, base.state, base.step) == ("base", "finished", None)
    card = json.loads((cut / "base" / "evaluation" / "eval.json").read_text())
    assert base.scores == {name: score["mean"] for name, score in card["scores"].items()}
    assert (sft.state, sft.step, sft.steps, sft.checkpoint) == ("training", 5, 6, 4)
    rows = [json.loads(line) for line in (cut / "sft" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert sft.metrics == {"loss": last["loss"]}
    assert sft.images_per_second == last["images_per_second"]
    assert sft.steps_per_second == pytest.approx(4 / (last["time"] - rows[1]["time"]))
    assert sft.held_out["shapes"] == [row["heldout/shapes"] for row in rows if "heldout/shapes" in row][-1]
    assert sft.seconds_left is None, "no process is at work"
    assert (more.state, more.step, more.steps) == ("waiting", None, 6)
    assert in_words(status) == (
        "not finished, no process is at work. To go on, give the command that began it again"
    )


def test_a_run_that_a_process_holds(cut):
    with locked(cut / ".lock"):
        status = status_of(cut)
    assert status.running
    assert in_words(status) == "running"
    sft = status.stages[1]
    passed = sft.seconds_since_record
    assert sft.seconds_left == pytest.approx(max(1 / sft.steps_per_second - passed, 0))


def test_looking_is_no_claim(cut, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    status_of(cut)
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()} == before
    with locked(cut / ".lock", wait=False) as free:
        assert free
    (tmp_path / "run.json").write_text((cut / "run.json").read_text())
    status_of(tmp_path)
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_run_that_waits_a_moment_for_a_look(tmp_path):
    file = tmp_path / ".lock"
    with locked(file), locked(file, wait=0.01) as second:
        assert not second


def test_the_command_prints_lines_or_json(cut, tmp_path):
    text = posttrain("status", cut, cwd=tmp_path).stdout.splitlines()
    assert text[0].startswith("small: not finished, no process is at work")
    assert text[1] == "base  finished"
    assert text[3].startswith("sft   training  step 5 of 6  loss ")
    assert any(line.startswith("      last checkpoint: step 4, ") for line in text)
    assert text[-1] == "more  waiting"
    read = json.loads(posttrain("status", cut, "--json", cwd=tmp_path).stdout)
    assert [stage["step"] for stage in read["stages"]] == [None, 5, None]
    assert read["finished"] is False
    assert "holds no run" in posttrain("status", tmp_path, cwd=tmp_path, code=1).stderr


def test_a_finished_run(cut, tmp_path):
    folder = tmp_path / "done"
    run_quietly(recipe(stage("sft", train="{steps: 1, batch_size: 2, sample_every: null}")), folder)
    status = status_of(folder)
    assert status.finished
    assert [(s.name, s.state, s.step, s.checkpoint) for s in status.stages] == [("sft", "finished", 1, 1)]
    (folder / "sft" / "stage.json").write_text("{")
    with pytest.raises(DamagedError, match=r"stage\.json' is damaged"):
        status_of(folder)
    with pytest.raises(PosttrainError, match=r"holds no run \(no run.json\)$"):
        status_of(tmp_path)
    with pytest.raises(PosttrainError, match=r"done/sft' holds no run \(no run.json\); its run is '.*done'$"):
        status_of(folder / "sft")
    with pytest.raises(PosttrainError, match=r"^no folder '.*gone' \(looked at "):
        status_of(tmp_path / "gone")


def test_alarms_refused_steps_and_evaluations_in_progress_are_told(tmp_path):
    folder = tmp_path / "r"
    (folder / "rl" / "evaluation" / "parts" / "000000").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": "r", "stages": [{"name": "base"}, {"name": "rl"}]}))
    (folder / "recipe.yaml").write_text(
        "evaluation: {}\nstages: [{name: rl, train: {steps: 9}, algorithm: {type: far}}]\n"
    )
    rows = [
        {"step": 3, "alarm/reward_hacking": 1.0, "time": 1.0},
        {"step": 4, "refused_steps": 1.0, "time": 1.0},
    ]
    (folder / "rl" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    (folder / "rl" / "stage.json").write_text(
        '{"steps": 9, "images_per_second": 7.5, "alarms": ["rl, step 3: reward_hacking: it fell"]}'
    )
    claim = {"prompts": {"rows": 10}, "sampler": {"batch_size": 4, "images_per_prompt": 2}}
    (folder / "rl" / "evaluation" / "claim.json").write_text(json.dumps(claim))
    base, rl = status_of(folder).stages
    assert base.state == "waiting"
    assert (rl.state, rl.evaluated, rl.steps, rl.refused_steps) == ("evaluating", [4, 20], 9, 1)
    assert rl.images_per_second == 7.5, "of training: not beside the images that are measured"
    assert list(lines_of(rl)) == [
        "evaluating  image 4 of 20  9 steps",
        "refused steps: 1",
        "alarm: rl, step 3: reward_hacking: it fell",
    ]
    (folder / "rl" / "stage.json").unlink()
    assert status_of(folder).stages[1].alarms == ["step 3: reward_hacking"]
    (folder / "rl" / "evaluation" / "claim.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"claim\.json' is damaged: it has no 'prompts', 'sampler'"):
        status_of(folder)


def test_the_lines_of_a_stage_that_trains():
    stage = StageStatus(
        "rl",
        "training",
        120,
        150,
        0.5,
        26.14,
        60.0,
        3.0,
        {"loss": 0.45},
        {"shapes": 0.41},
        checkpoint=100,
        seconds_since_checkpoint=130,
    )
    assert list(lines_of(stage)) == [
        "training  step 120 of 150  loss 0.4500  26.1 images/s  60 s left  recorded 3 s ago",
        "held out: shapes 0.410",
        "last checkpoint: step 100, 2 min ago",
    ]
    assert in_words(RunStatus("r", "r", None, [stage])).startswith(
        "not finished, whether a process is at work"
    )
