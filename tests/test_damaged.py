"""A damaged file of a run folder is named, and made again where it can be made again."""

import json
import os
import shutil

import pytest
import torch
from forked import finished as finished_process
from html_page import checked
from runs import EVALUATION, recipe, run_quietly, stage

from posttrain.cli.status import lines_of
from posttrain.engine.tracker import DAMAGED, read_metrics
from posttrain.errors import DamagedError, DataError, ModelError, PosttrainError
from posttrain.evaluation.compare import load
from posttrain.evaluation.parts import Occupied, claim, merge_parts
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.table import table
from posttrain.shapes import dataset
from posttrain.stages.artifact import open_artifact
from posttrain.stages.result import open_run
from posttrain.stages.status import status_of
from posttrain.support.records import read_object, read_rows

TRAIN = "{steps: 2, batch_size: 2, micro_batch: 2, log_every: 1, sample_every: null}"
MADE = recipe(stage("sft", train=TRAIN), evaluation=EVALUATION)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    run_quietly(MADE, folder)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def damage(file, how):
    """Leave ``file`` as a fault may: empty, cut in the middle, not text, or whole JSON of another kind."""
    whole = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "cut": whole[: len(whole) // 2], "no text": b"\xff\xfe\x00", "other": b"[1, 2]\n"}[how]
    )


def read_again(file):
    return read_rows(file) if file.suffix == ".jsonl" else read_object(file) if file.suffix == ".json" else {}


MENDED = [
    # file, how it is damaged, what the next run prints; None for what is made each time
    ("report.html", "empty", None),
    ("report.html", "no text", None),
    ("run.json", "empty", "run.json' is damaged: it is empty; it is made again"),
    ("run.json", "cut", "it is made again"),
    ("run.json", "other", "run.json' is damaged: it is no JSON object; it is made again"),
    ("environment.json", "empty", "environment.json' is damaged: it is empty; it is made again"),
    ("environment.json", "no text", "environment.json' is damaged: byte 0 is no text; it is made again"),
    ("recipe.yaml", "empty", "run/recipe.yaml"),
    ("recipe.yaml", "no text", "recipe.yaml is not a text file in UTF-8 (byte 0); it is made again"),
    ("recipe.yaml", "cut", "it is made again"),
    ("sft/recipe.yaml", "cut", "it is made again from the run's recipe.yaml"),
    ("base/recipe.yaml", "empty", "base/recipe.yaml"),
    ("sft/stage.json", "empty", "stage.json' is damaged: it is empty; what the stage wrote is made again from"),
    ("sft/stage.json", "other", "made again from its checkpoint of step 2"),
    ("sft/final/posttrain.json", "cut", "made again from its checkpoint of step 2"),
    ("sft/metrics.jsonl", "other", "metrics.jsonl: damaged in line 1, now left out; kept as metrics.damaged.jsonl"),
    ("sft/evaluation/eval.json", "empty", "sft: is evaluated again ('"),
    ("base/evaluation/eval.json", "other", "eval.json' is damaged: it is no JSON object); the one of before is kept"),
    ("base/evaluation/records.jsonl", "cut", "evaluation/records.jsonl:"),
    ("base/evaluation/records.jsonl", "empty", "records.jsonl' is damaged: it has 0 rows, not 6)"),
    ("base/evaluation/records.jsonl", "no text", "base: is evaluated again ('"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "words"), MENDED)
def test_a_damaged_file_is_made_again(run_folder, finished, name, how, words):
    damage(run_folder / name, how)
    printed = run_quietly(MADE, run_folder)
    assert words is None or words in printed
    read_again(run_folder / name)
    assert (run_folder / name).stat().st_size > 0 or name == "sft/metrics.jsonl"
    again = run_quietly(MADE, run_folder)
    assert "is damaged" not in again
    assert "made again" not in again
    scores = [
        json.loads((f / "sft/evaluation/eval.json").read_text())["scores"] for f in (run_folder, finished)
    ]
    assert scores[0] == scores[1]


UNREADABLE = ["empty", "cut", "no text", "other"]


@pytest.mark.parametrize("how", UNREADABLE)
def test_what_reads_a_damaged_file_elsewhere_names_it(run_folder, how):
    damage(run_folder / "sft" / "final" / "posttrain.json", how)
    with pytest.raises(ModelError, match=r"sft/final/posttrain\.json' is damaged: "):
        open_artifact(str(run_folder / "sft"), torch.device("cpu"))
    for name in ("records.jsonl", "eval.json"):
        damage(run_folder / "base" / "evaluation" / name, how)
        with pytest.raises(DamagedError, match=rf"base/evaluation/{name}\S* is damaged: "):
            load([run_folder / "base", run_folder / "sft"])
    assert "base/evaluation/eval.json' is damaged: " in told(run_folder)


def told(run_folder):
    """What the page, the table, the status and Python tell of damage; all tell the same."""
    lines = open_run(run_folder).damage
    page = checked(write_report(run_folder).read_text("utf-8"))
    shown = [line.text.removeprefix("Beware: ") for line in page.all("p", class_="warn")]
    assert [line for line in shown if "'" in line] == lines
    assert all(line in str(table(run_folder).title) for line in lines)
    assert sorted(line for stage in status_of(run_folder).stages for line in stage.damage) == sorted(
        line for line in lines if "/recipe.yaml" not in line and "environment.json" not in line
    )
    for status in status_of(run_folder).stages:
        printed = [line.removeprefix("damaged: ") for line in lines_of(status)]
        assert all(line in printed for line in status.damage)
    return "\n".join(lines)


RUN, FRESH = "'posttrain run' with its recipe ", "only the stage trained afresh (--fresh) makes it again"
TOLD = [
    ("base/evaluation/records.jsonl", "empty", "records.jsonl' is damaged: it has 0 rows, not 6; " + RUN),
    ("base/evaluation/records.jsonl", "gone", "records.jsonl': No such file or directory; " + RUN),
    ("sft/evaluation/records.jsonl", "cut", "; " + RUN + "measures it again"),
    ("sft/evaluation/eval.json", "gone", "eval.json' is missing, but records.jsonl is there; " + RUN),
    ("sft/evaluation/eval.json", "{}", "eval.json' is damaged: it has no 'scores'; " + RUN),
    (
        "sft/evaluation/eval.json",
        '{"scores": {"s": {}}}',
        "eval.json' is damaged: 's' is not what was written",
    ),
    ("sft/evaluation/eval.json", '{"scores": []}', "eval.json' is damaged: 'scores' is not what was written"),
    ("sft/metrics.jsonl", "gone", "metrics.jsonl' is missing; " + FRESH),
    ("sft/metrics.jsonl", "empty", "metrics.jsonl' has no rows; " + FRESH),
    ("sft/metrics.jsonl", "other", "metrics.jsonl' is damaged in line 1, left out here; " + FRESH),
    ("sft/stage.json", "gone", "stage.json' is missing, but sft was evaluated; " + RUN + "makes it again"),
    ("environment.json", "gone", "environment.json' is missing; " + RUN + "makes it again"),
]


@pytest.mark.parametrize(("name", "how", "words"), TOLD)
def test_a_damaged_file_is_told_wherever_results_are_read_and_the_rest_is_shown(run_folder, name, how, words):
    assert told(run_folder) == ""
    file = run_folder / name
    if how == "gone":
        file.unlink()
    elif how in UNREADABLE:
        damage(file, how)
    else:
        file.write_text(how)
    (line,) = told(run_folder).splitlines()
    assert name in line
    assert words in line
    other = "base" if name.startswith("sft") else "sft"
    assert open_run(run_folder).scores(other)
    if "evaluation" in name:
        state = {stage.name: stage.state for stage in status_of(run_folder).stages}
        assert "finished" != state[name.split("/")[0]] != state[other] == "finished"


def test_damaged_lines_of_metrics_are_left_out_and_the_file_is_kept(run_folder):
    file = run_folder / "sft" / "metrics.jsonl"
    whole = read_metrics(file)
    first, second = file.read_text().splitlines()
    damaged = f'{first}\n[1]\n\x00\n{{"step": "x"}}\n{second}\n{second[:9]}'
    file.write_text(damaged)
    printed = run_quietly(MADE, run_folder)
    assert f"{file}: damaged in line 2, 3, 4, now left out; kept as {DAMAGED}" in printed
    assert read_metrics(file) == whole
    assert (run_folder / "sft" / DAMAGED).read_text() == damaged
    assert "damaged in line" not in run_quietly(MADE, run_folder)


@pytest.mark.parametrize("name", ["records.jsonl", "cost.json"])
@pytest.mark.parametrize("how", UNREADABLE)
def test_a_damaged_part_of_an_evaluation_is_named_and_measured_again(tmp_path, name, how):
    part = tmp_path / "parts" / "000000"
    part.mkdir(parents=True)
    (part / "records.jsonl").write_text('{"prompt": "p", "index": 0, "tag": null, "scores": {}}\n' * 9)
    (part / "cost.json").write_text('{"seconds": 1, "forward_equivalents": 2}')
    assert len(merge_parts(tmp_path, [9])[0]) == 9
    damage(part / name, how)
    with pytest.raises(PosttrainError, match=rf"{name}\S* is damaged: .*the same command measures it again"):
        merge_parts(tmp_path, [9])
    assert not part.exists()


@pytest.mark.parametrize("name", ["eval.json", "claim.json"])
def test_a_damaged_evaluation_is_not_claimed(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(Occupied, match=rf"{name}' is damaged: .*Give another folder, or remove this one"):
        claim(tmp_path, {}, print)


def test_an_unfinished_evaluation_of_other_settings_is_removed(run_folder):
    evaluation = run_folder / "sft" / "evaluation"
    for content in ("", (evaluation / "eval.json").read_text().replace('"guidance": 2.0', '"guidance": 3.0')):
        shutil.rmtree(evaluation)
        (evaluation / "parts" / "000000").mkdir(parents=True)
        (evaluation / "claim.json").write_text(content)
        printed = run_quietly(MADE, run_folder)
        why = "sampler.guidance (was 3.0, now 2.0)" if content else "claim.json' is damaged: it is empty"
        assert f"{why}); what was measured of it before is removed" in printed
        assert (evaluation / "eval.json").is_file()
    assert [path.name for path in evaluation.parent.glob("evaluation*")] == ["evaluation"]


def test_an_evaluation_without_its_card_is_kept_and_measured_again(run_folder):
    (run_folder / "base" / "evaluation" / "eval.json").unlink()
    printed = run_quietly(MADE, run_folder)
    assert (
        "base: is evaluated again (there is no eval.json); the one of before is kept as evaluation-1"
        in printed
    )


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_data_set_whose_description_is_damaged_is_rendered_again(tmp_path, how):
    dataset.build(tmp_path / "a", 4, 0)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    damage(tmp_path / "a" / "shapes.json", how)
    if how == "other":  # it can be read, and is of something else
        with pytest.raises(DataError, match="another Shapes data set"):
            dataset.build(tmp_path / "a", 4, 0)
        return
    (tmp_path / "a" / "train.jsonl").write_text("")
    dataset.build(tmp_path / "a", 4, 0)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == whole
    damage(tmp_path / "a" / "shapes.json", how)
    (tmp_path / "a" / "mine.txt").touch()
    with pytest.raises(DataError, match="something else"):
        dataset.build(tmp_path / "a", 4, 0)


def test_a_data_set_half_built_by_a_killed_process_is_cleared_up(tmp_path):
    def dying():
        dataset.render = lambda scene: os.kill(os.getpid(), 9)
        dataset.build(tmp_path / "a", 4, 0)

    assert finished_process(dying).returncode == -9
    assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
    dataset.build(tmp_path / "a", 4, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_clears_up_what_a_killed_one_left_unfinished(run_folder):
    left = [
        "data/.shapes-web-9-1.part/images",
        "sft/checkpoints/.step-00000003.part",
        ".report.html.1a2b3c4d.part",
        "sft/.final.before.part",
    ]
    for name in left:
        (run_folder / name).mkdir(parents=True)
    run_quietly(MADE, run_folder)
    assert {path.name for path in run_folder.rglob(".*")} == {".lock"}
    (run_folder / "sft" / "final").rename(
        run_folder / "sft" / ".final.before.part"
    )  # a kill between two renames
    assert "finished before" in run_quietly(MADE, run_folder)
    assert (run_folder / "sft" / "final" / "posttrain.json").is_file()


def test_records_name_file_line_and_what_they_lack(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(DamagedError, match=r"cannot read .*a\.json': No such file"):
        read_object(file)
    file.write_text('{"a": 1}')
    assert read_object(file, "a") == {"a": 1}
    with pytest.raises(DamagedError, match=r"a\.json' is damaged: it has no 'b', 'c'"):
        read_object(file, "b", "a", "c")
    file.write_text('{"a": 1}\n{"b": 1}\n')
    with pytest.raises(DamagedError, match=r"a\.json:2' is damaged: it has no 'a'"):
        read_rows(file, "a")
    file.write_text("[" * 100_000)
    with pytest.raises(DamagedError, match="is damaged"):
        read_object(file)
