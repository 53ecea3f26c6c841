"""Runs that are changed while they live: longer, with more stages, other evaluations, another model, anew."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from pipelines import pipeline_folder
from rich.console import Console
from runs import EVALUATION, HEAD, cut_off_after, recipe, run_quietly, stage
from stored import whole_state

from posttrain.cli.app import main
from posttrain.engine import checkpoint_folder
from posttrain.engine.tracker import read_metrics
from posttrain.errors import DamagedError, ModelError, PosttrainError, RecipeError, TrainingError
from posttrain.models.tiny_sd3 import TinySD3
from posttrain.recipe.deciding import fingerprint, former_fingerprint
from posttrain.recipe.file import dump_recipe, overridden
from posttrain.stages.account import Account
from posttrain.stages.chain import run
from posttrain.stages.hooks.held_out import HeldOut
from posttrain.support import heartbeat
from posttrain.support.files import locked

TRAIN = "{steps: 2, batch_size: 2, micro_batch: 2, learning_rate: 1e-3, checkpoint_every: 1, keep_checkpoints: 9, log_every: 1, ema: 0.9, sample_every: null}"


def sft(name="sft", **fields):
    return stage(name, train=TRAIN, **fields)


def last_state(folder):
    return whole_state(checkpoint_folder.saved(folder / "checkpoints")[-1])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished run of two steps, evaluated."""
    folder, made = tmp_path_factory.mktemp("two") / "run", recipe(sft(), evaluation=EVALUATION)
    run_quietly(made, folder)
    return folder, made


@pytest.fixture
def copied(two, tmp_path):
    return shutil.copytree(two[0], tmp_path / "run"), two[1]


def test_a_run_that_grows_has_the_weights_of_one_that_was_as_long_from_the_start(copied, tmp_path):
    folder, made = copied
    longer = overridden(
        made, ["stages.sft.train.steps=3", "stages.sft.train.micro_batch=1", "evaluation=null"]
    )
    printed = run_quietly(longer, folder)
    assert "stages.sft.train.steps (was 2, now 3): the stage ends after step 3" in printed
    assert "going on after step 2" in printed
    run_quietly(overridden(made, ["stages.sft.train.steps=3", "evaluation=null"]), tmp_path / "straight")
    grown, straight = (last_state(f / "sft")["trained"] for f in (folder, tmp_path / "straight"))
    assert all(torch.allclose(grown[name], straight[name], atol=1e-6) for name in straight)
    assert [row["step"] for row in read_metrics(folder / "sft" / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((folder / "sft" / "stage.json").read_text())["steps"] == 3
    assert run_quietly(longer, folder).count("finished before") == 1
    with pytest.raises(RecipeError, match=r"now 2\): 3 steps are taken already"):
        run_quietly(made, folder)


def test_a_killed_run_shrinks_to_the_steps_that_are_done(tmp_path, monkeypatch):
    made = recipe(sft())
    cut_off_after(2, made, tmp_path, monkeypatch)  # the state after 1 step is kept
    shorter = overridden(made, ["stages.sft.train.steps=1"])
    run_quietly(shorter, tmp_path)
    assert json.loads((tmp_path / "sft" / "stage.json").read_text())["samples"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "sft" / "metrics.jsonl")] == [1]


def test_checkpoints_of_the_former_fingerprint_are_read_and_new_ones_have_the_present_one(
    tmp_path, monkeypatch
):
    made = recipe(stage("sft"))
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.stages.prepare.fingerprint", former_fingerprint)
        cut_off_after(4, made, tmp_path, monkeypatch)
    (old,) = {
        json.loads(file.read_text())["fingerprint"]
        for file in tmp_path.glob("sft/checkpoints/*/manifest.json")
    }
    assert old == former_fingerprint(made, "sft") != fingerprint(made, "sft")
    assert "sft: going on after step 2" in run_quietly(made, tmp_path)
    last = max(tmp_path.glob("sft/checkpoints/*/manifest.json"))
    assert json.loads(last.read_text())["fingerprint"] == fingerprint(made, "sft")


def test_stages_and_evaluations_come_and_go(copied):
    folder, made = copied
    more = recipe(sft(), sft("next"), evaluation=EVALUATION.replace("count: 6", "count: 3"))
    printed = run_quietly(more, folder)
    assert printed.count("finished before") == 1
    for name in ("base", "sft"):
        assert (
            f"{name}: is evaluated again (prompts.count (was 6, now 3); and more); the one of before"
            in printed
        )
        assert json.loads((folder / name / "evaluation-1" / "eval.json").read_text())["images"] == 6
    for name in ("base", "sft", "next"):
        assert json.loads((folder / name / "evaluation" / "eval.json").read_text())["images"] == 3
    fewer = overridden(made, ["evaluation.prompts.count=3", "evaluation.batch_size=2", "evaluation.grid=1"])
    printed = run_quietly(fewer, folder)
    assert "next: is not in the recipe any more; its folder stays" in printed
    assert "evaluated again" not in printed
    assert "\nnext" not in printed
    assert [row["name"] for row in json.loads((folder / "run.json").read_text())["stages"]] == ["base", "sft"]
    assert run_quietly(more, folder).count("finished before") == 2


def test_a_model_that_could_not_be_loaded_claims_nothing(tmp_path):
    broken = shutil.copytree(pipeline_folder(), tmp_path / "model")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    wrong = overridden(recipe(sft()), [f"model.path={broken}", "seed=5"])
    with pytest.raises((PosttrainError, OSError)):
        run_quietly(wrong, tmp_path / "run")
    run_quietly(recipe(sft()), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == dump_recipe(recipe(sft()))


def test_a_model_that_is_made_is_made_again_for_other_settings(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("posttrain.models.tiny_sd3._build", lambda spec, *_: made.append(spec.layers))
    for layers in (1, 1, 2):
        TinySD3(layers=layers).build(tmp_path, torch.device("cpu"))
    assert made == [1, 2]
    (tmp_path / "tiny-sd3" / "tiny_sd3.json").write_text("")
    with pytest.raises(DamagedError, match=r"tiny_sd3\.json' is damaged: it is empty"):
        TinySD3(layers=2).build(tmp_path, torch.device("cpu"))


def test_a_changed_stage_begins_anew_when_it_is_asked_for(copied):
    folder, made = copied
    other = overridden(made, ["stages.sft.train.learning_rate=0.002", "evaluation=null"])
    with pytest.raises(RecipeError, match="--fresh sft"):
        run_quietly(other, folder)
    text = io.StringIO()
    run(other, folder, Console(file=text, width=200), ["sft"])
    assert "sft: removed what it wrote; it begins anew" in text.getvalue()
    first, *_ = read_metrics(folder / "sft" / "metrics.jsonl")
    assert first["learning_rate"] == 0.002
    assert list((folder / "sft").glob("evaluation*")) == []


def test_nothing_is_removed_where_the_recipe_is_refused(copied):
    folder, _ = copied
    more = recipe(sft(), sft("next", start_from="base"), evaluation=EVALUATION)
    run_quietly(more, folder)
    other = overridden(more, ["stages.sft.train.learning_rate=0.002"])
    with pytest.raises(RecipeError, match="--fresh sft"):
        run(other, folder, Console(file=io.StringIO()), ["next"])
    assert (folder / "next" / "stage.json").exists()


def test_a_stage_goes_on_after_the_steps_of_a_parent_that_ended_early_changed(copied, monkeypatch):
    folder, _ = copied
    (folder / "sft" / "stage.json").write_text('{"steps": 1}')  # as after an alarm's rollback
    more = overridden(recipe(sft(), sft("next"), evaluation=EVALUATION), ["evaluation=null"])
    cut_off_after(2, more, folder, monkeypatch)  # the state after 1 step is kept
    printed = run_quietly(overridden(more, ["stages.sft.train.steps=5"]), folder)
    assert "no effect, the stage ended early, after step 1" in printed
    assert "next: going on after step 1" in printed


def test_the_best_of_another_score_is_not_compared():
    made = recipe(sft(monitor="{every: 1, prompts: 2}"), evaluation=EVALUATION)
    train = made.stages[0].train.model_copy(update={"keep_best": "shapes"})
    run_ = SimpleNamespace(stage=made.stages[0].model_copy(update={"train": train}), note=print)
    account = Account(best=4, best_score=21.0, best_by="pickscore")
    training = SimpleNamespace(run=run_, policy=None, account=account)
    for _ in range(2):
        HeldOut(training, made.stages[0].monitor, made.evaluation, None, None, None)  # type: ignore[arg-type]
        assert (account.best, account.best_score, account.best_by) == (None, None, "shapes")
    account.best = 7
    HeldOut(training, made.stages[0].monitor, made.evaluation, None, None, None)  # type: ignore[arg-type]
    assert account.best == 7


def test_the_command_begins_anew_and_says_how_to_go_on_when_it_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + sft())
    command = [
        "posttrain",
        "run",
        str(tmp_path / "r.yaml"),
        "--output",
        str(tmp_path / "run"),
        "--fresh",
        "sfd",
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "--fresh sfd: no such stage" in said
    assert "To go on" not in said, "no stage began"
    monkeypatch.setattr("sys.argv", [*command[:-1], "sft"])

    def fail(*_):
        raise TrainingError("it fails")

    monkeypatch.setattr("posttrain.stages.stage.prepare", fail)
    with pytest.raises(SystemExit):
        main()
    assert "it fails\nTo go on, leave --fresh out" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def nothing_begun_anew():
    heartbeat.begun_anew = False


def test_a_run_that_another_one_keeps_out_is_not_told_to_leave_fresh_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + sft())
    run = ["posttrain", "run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run"), "--fresh", "sft"]
    monkeypatch.setattr("sys.argv", run)
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock"), pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: another run is writing to ")
    assert "To go on" not in said


def test_a_checkpoint_is_opened_by_the_recipe_of_its_stage(copied):
    from posttrain.stages.artifact import open_artifact

    folder, _ = copied
    (folder / "recipe.yaml").unlink()
    step = folder / "sft" / "checkpoints" / "step-00000002"
    assert open_artifact(str(step), torch.device("cpu"))[1] == "ema"
    (folder / "sft" / "recipe.yaml").write_text("")
    with pytest.raises(ModelError, match=r"is a checkpoint, but .*sft' does not say by which recipe"):
        open_artifact(str(step), torch.device("cpu"))


def test_held_out_scores_of_other_prompts_are_not_compared():
    made, notes = recipe(sft(monitor="{every: 1, prompts: 2}"), evaluation=EVALUATION), []
    run_ = SimpleNamespace(stage=made.stages[0], note=notes.append)
    account = Account(readings=[{"shapes": [1.0, 0.0]}], rewards=[0.5], read_at=0)
    training = SimpleNamespace(run=run_, policy=None, account=account)

    def hook(evaluation=made.evaluation, prompts=2):
        monitor = made.stages[0].monitor.model_copy(update={"prompts": prompts})
        HeldOut(training, monitor, evaluation, None, None, None)  # type: ignore[arg-type]

    hook()
    hook(made.evaluation.model_copy(update={"batch_size": 99}))
    assert (notes, len(account.readings)) == ([], 1)
    hook(prompts=3)
    assert (account.readings, account.rewards, account.read_at) == ([], [], None)
    account.readings.append({})
    account.best, account.best_score = 4, 9.0
    hook(made.evaluation.model_copy(update={"steps": 9}), prompts=3)
    assert (account.readings, account.best, account.best_score) == ([], None, None)
    assert (
        notes
        == ["sft: held-out scores begin anew: the evaluation, its prompts or monitor.prompts changed"] * 2
    )
