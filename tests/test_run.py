"""Tests that a run does what its recipe says, resumes exactly, and writes artifacts that other tools load."""

import functools
import json
import re
import shutil

import pytest
import torch
from runs import DATA, EVALUATION, HEAD, TRAIN, cut_off_after, recipe, run_quietly, stage
from safetensors.torch import load_file
from stored import whole_state

from posttrain.engine.checkpoint_folder import saved
from posttrain.engine.tracker import read_metrics
from posttrain.engine.trainer import train
from posttrain.errors import ModelError, PosttrainError, RecipeError, TrainingError
from posttrain.policy import Policy
from posttrain.recipe.file import dump_recipe, load_recipe
from posttrain.sampling.latents import sample_images
from posttrain.shapes.dataset import build
from posttrain.stages.artifact import open_artifact
from posttrain.support.files import published

CPU = torch.device("cpu")
SOAR = "{type: soar, trajectory_length: 2}"


def weights(folder):
    file = folder / "final" / "transformer" / "diffusion_pytorch_model.safetensors"
    return load_file(file)


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """base -> sft, base -> soar -> lora, evaluated."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    made = recipe(
        stage("sft", start_from="base"),
        stage("soar", SOAR, start_from="base"),
        stage("lora", SOAR, tune="{type: lora, rank: 2, alpha: 4}"),
        evaluation=EVALUATION,
    )
    return folder, made, run_quietly(made, folder)


def test_a_run_writes_everything_that_the_design_promises(finished):
    folder, _, printed = finished
    for name in ("recipe.yaml", "environment.json", "run.json", "report.html"):
        assert (folder / name).stat().st_size > 0
    for name in ("sft", "soar", "lora"):
        rows = read_metrics(folder / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        account = json.loads((folder / name / "stage.json").read_text())
        assert account["steps"] == 6
        assert account["peak_memory_bytes"] > 1e6
        assert (folder / name / "evaluation" / "eval.json").is_file()
    assert "report:" in printed
    assert printed.index("base") < printed.index("soar")


def test_an_image_that_was_left_out_before_a_stage_was_killed_is_named_at_its_end(tmp_path, monkeypatch):
    build(tmp_path / "data", 8, 1, "clean")
    damaged = min((tmp_path / "data" / "images").iterdir())
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-40])
    images = f"images: {tmp_path}/data/train.jsonl, image_dir: {tmp_path}/data/images"
    made = recipe(stage("sft").replace(DATA, f"{{{images}, resolution: 16, tolerance: 0.3}}"))
    cut_off_after(4, made, tmp_path / "run", monkeypatch)
    damaged.write_bytes(whole)
    run_quietly(made, tmp_path / "run")
    (line,) = json.loads((tmp_path / "run" / "sft" / "stage.json").read_text())["skipped"]
    assert damaged.name in line


def test_the_bill_counts_every_forward(finished):
    folder, _, _ = finished
    # 10 images in batches of 4, 4, 2; six steps are two epochs of 10 samples
    sft, soar = (json.loads((folder / n / "stage.json").read_text()) for n in ("sft", "soar"))
    assert sft["samples"] == soar["samples"] == 20
    assert sft["forward_equivalents"] == 20 * 3
    assert soar["forward_equivalents"] == 20 * (3 * 3 + 2)


def test_sibling_stages_see_the_same_samples_and_draws(finished):
    """The base items of SFT and SOAR are equal, so is the first loss of SOAR without its auxiliary points."""
    _, made, _ = finished
    assert made.depth(made.stages[0]) == made.depth(made.stages[1]) == 0
    assert made.depth(made.stages[2]) == 1


def test_soar_without_auxiliary_points_trains_the_weights_of_sft_to_the_bit(finished, tmp_path):
    folder, _, _ = finished
    run_quietly(recipe(stage("soar", "{type: soar, trajectory_length: 0}")), tmp_path / "run")
    assert_equal_weights(weights(folder / "sft"), weights(tmp_path / "run" / "soar"))


def test_every_sample_is_recorded_once_with_its_score(finished):
    folder, _, _ = finished
    rows = [
        json.loads(line)
        for line in (folder / "soar" / "evaluation" / "records.jsonl").read_text().splitlines()
    ]
    summary = json.loads((folder / "soar" / "evaluation" / "eval.json").read_text())
    assert len(rows) == len({(row["prompt"], row["index"]) for row in rows}) == summary["images"] == 6
    mean = sum(row["scores"]["shapes"] for row in rows) / 6
    assert summary["scores"]["shapes"]["mean"] == pytest.approx(mean)
    assert summary["model"]["weights"] == "ema"


def test_the_same_command_again_skips_what_is_finished(finished):
    folder, made, _ = finished
    before = (folder / "soar" / "stage.json").stat().st_mtime_ns
    printed = run_quietly(made, folder)
    assert printed.count("finished before") == 3
    assert (folder / "soar" / "stage.json").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_folder_is_refused_by_field(finished):
    folder, made, _ = finished
    train_ = made.stages[0].train.model_copy(update={"learning_rate": 5e-4})
    changed = made.model_copy(
        update={"stages": [made.stages[0].model_copy(update={"train": train_}), *made.stages[1:]]}
    )
    with pytest.raises(RecipeError, match=r"stages\.sft\.train\.learning_rate \(was 0\.001, now 0\.0005\)"):
        run_quietly(changed, folder)


@pytest.mark.parametrize("name", ["sft", "soar", "lora"])
def test_every_artifact_is_opened_again_as_it_was_evaluated(finished, name, tmp_path):
    folder, made, _ = finished
    moved = shutil.copytree(folder, tmp_path / "moved")
    model, kind = open_artifact(str(moved / name), CPU)
    assert kind == "ema"
    assert model.spec.max_sequence_length == 16
    rows = [
        json.loads(line) for line in (folder / name / "evaluation" / "records.jsonl").read_text().splitlines()
    ]
    evaluation = made.evaluation
    images = sample_images(
        Policy(model),
        [row["prompt"] for row in rows],
        [row["index"] for row in rows],
        resolution=16,
        steps=evaluation.steps,
        guidance=evaluation.guidance,
    )
    from PIL import Image

    from posttrain.support.images import to_pil

    first = Image.open(folder / name / "evaluation" / "grid" / "000.png")
    assert list(to_pil(images[:1])[0].getdata()) == list(first.getdata())


def test_a_lora_stage_starts_from_the_merged_stage_before(finished):
    folder, _, _ = finished
    description = json.loads((folder / "lora" / "final" / "posttrain.json").read_text())
    assert description["parents"] == ["../../soar/final"]
    assert sorted(p.name for p in (folder / "lora" / "final").iterdir()) == [
        "README.md",
        "grid.png",
        "posttrain.json",
        "pytorch_lora_weights.safetensors",
    ]


class Killed(BaseException):
    pass


def tuned(rank=None):
    """A recipe of one stage: of a LoRA of that rank, or of the whole model."""
    return recipe(stage("soar", SOAR, tune=f"{{type: lora, rank: {rank}}}" if rank else "{type: full}"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of each ``tuned`` recipe that was asked for."""

    @functools.cache
    def finished_run(rank):
        folder = tmp_path_factory.mktemp("whole") / "run"
        run_quietly(tuned(rank), folder)
        return folder

    return finished_run


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
@pytest.mark.parametrize("dies_after", [1, 3, 5])
def test_a_killed_stage_goes_on_to_the_same_weights_bit_for_bit(
    tmp_path, monkeypatch, whole, dies_after, rank
):
    made, folders = tuned(rank), (whole(rank), tmp_path / "killed")

    def dying(algorithm, policy, strategy, batches, settings, watch, start=0):
        after = watch.after_step

        def after_step(step, samples, metrics):
            after(step, samples, metrics)
            if step == dies_after:
                raise Killed

        monkeypatch.setattr(watch, "after_step", after_step)
        train(algorithm, policy, strategy, batches, settings, watch, start)

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.stages.stage.train", dying)
        with pytest.raises(Killed):
            run_quietly(made, tmp_path / "killed")
    printed = run_quietly(made, tmp_path / "killed")
    assert ("going on after step" in printed) is (dies_after > 2)
    a, b = (saved(folder / "soar" / "checkpoints")[-1] for folder in folders)
    first, second = (whole_state(c) for c in (a, b))
    assert_equal_weights(first["trained"], second["trained"])
    assert_equal_weights(first["roles"]["ema"], second["roles"]["ema"])
    for one, other in zip(first["optimizer"].values(), second["optimizer"].values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    losses = [[row["loss"] for row in read_metrics(folder / "soar" / "metrics.jsonl")] for folder in folders]
    assert losses[0] == losses[1]
    account = json.loads((tmp_path / "killed" / "soar" / "stage.json").read_text())
    assert account["samples"] == 20


def test_a_stage_of_reflexflow_goes_on_to_the_same_weights_and_records(tmp_path, monkeypatch):
    made = recipe(stage("s", "{type: reflexflow}"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_quietly(made, whole)
    cut_off_after(3, made, cut, monkeypatch)
    assert "going on after step 2" in run_quietly(made, cut)
    assert_equal_weights(*(weights(folder / "s") for folder in (whole, cut)))
    names = ("loss", "matching_loss", "drift_loss", "exposure_bias", "grad_norm")
    rows, again = (
        [{n: row[n] for n in names} for row in read_metrics(folder / "s" / "metrics.jsonl")]
        for folder in (whole, cut)
    )
    assert rows == again
    for row in rows:
        assert row["loss"] == pytest.approx(row["matching_loss"] + 10 * row["drift_loss"], rel=1e-5)
        assert 0 < row["drift_loss"] < 4
    account = json.loads((cut / "s" / "stage.json").read_text())
    assert account["forward_equivalents"] == 9 * account["samples"] == 9 * 20


def test_only_the_last_checkpoints_are_kept_and_the_last_step_is_among_them(finished):
    folder, _, _ = finished
    assert [p.name for p in saved(folder / "sft" / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]


def test_the_exported_weights_are_the_moving_average(finished):
    folder, _, _ = finished
    state = whole_state(saved(folder / "sft" / "checkpoints")[-1])
    final = weights(folder / "sft")
    assert_equal_weights({n: final[n] for n in state["roles"]["ema"]}, state["roles"]["ema"])
    assert not torch.equal(state["trained"]["proj_out.weight"], state["roles"]["ema"]["proj_out.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    wild = TRAIN.replace("learning_rate: 1e-3", "learning_rate: 1e30")
    with pytest.raises(
        TrainingError, match=r"step 4: the loss .* not finite; the step was not taken, as were 3"
    ):
        run_quietly(recipe(stage("sft", train=wild)), tmp_path / "run")
    stage_folder = tmp_path / "run" / "sft"
    assert not (stage_folder / "final").exists()
    assert not (stage_folder / "stage.json").exists()
    rows = [
        json.loads(line) for line in (stage_folder / "refused_steps.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(rows) == 10
    assert [row["step"] for row in rows] == [2] * 2 + [3] * 4 + [4] * 4
    assert set(rows[0]) == {"step", "id", "prompt", "sample", "loss", "sigma"}
    assert rows[0]["prompt"].startswith("a photo of")
    told = [row["step"] for row in read_metrics(stage_folder / "metrics.jsonl") if "refused_steps" in row]
    assert told == [2, 3, 4]


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PosttrainError, match="another run is writing"):
            run_quietly(recipe(stage("sft")), tmp_path / "run")


def test_a_full_disk_is_one_clear_error_and_leaves_the_checkpoint_before(tmp_path):
    target = tmp_path / "step-00000001"
    with published(target) as part:
        (part / "a").write_text("good")

    with pytest.raises(PosttrainError, match=r"the disk is full .* GB free"), published(target):
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_checkpoints_of_another_rank_are_refused(tmp_path, whole):
    shutil.copytree(whole(2), tmp_path / "run")
    (tmp_path / "run" / "soar" / "stage.json").unlink()
    for file in ("recipe.yaml", "soar/recipe.yaml"):
        (tmp_path / "run" / file).write_text(dump_recipe(tuned(3)))
    with pytest.raises(
        PosttrainError, match="step-00000006: it is of another run, or of a stage with other settings"
    ):
        run_quietly(tuned(3), tmp_path / "run")


def test_start_from_a_path_is_the_model_written_there(finished, tmp_path):
    folder, _, _ = finished
    frozen = TRAIN.replace("learning_rate: 1e-3", "learning_rate: 1e-12").replace(", ema: 0.9", "")
    run_quietly(recipe(stage("next", train=frozen, start_from=folder / "soar" / "final")), tmp_path / "run")
    start, end = weights(folder / "soar"), weights(tmp_path / "run" / "next")
    assert all(torch.allclose(start[n], end[n], atol=1e-6) for n in start)


def test_bf16_autocast_keeps_weights_and_optimizer_in_float32(finished, tmp_path):
    bf16 = TRAIN.replace("{", "{precision: bf16, gradient_checkpointing: full, ")
    run_quietly(recipe(stage("sft", train=bf16)), tmp_path / "run")
    state = whole_state(saved(tmp_path / "run" / "sft" / "checkpoints")[-1])
    assert {t.dtype for t in state["trained"].values()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in state["optimizer"].values()} == {torch.float32}
    runs = (tmp_path / "run", finished[0])
    a, b = (read_metrics(folder / "sft" / "metrics.jsonl")[0]["loss"] for folder in runs)
    assert a != b
    assert a == pytest.approx(b, rel=0.02)


def test_gradient_checkpointing_changes_no_number(finished, tmp_path):
    folder, _, _ = finished
    saving = TRAIN.replace("{", "{gradient_checkpointing: full, ")
    run_quietly(recipe(stage("sft", train=saving)), tmp_path / "run")
    assert_equal_weights(weights(tmp_path / "run" / "sft"), weights(folder / "sft"))


def test_the_python_api_runs_the_same_recipe(tmp_path, monkeypatch):
    import posttrain

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + stage("sft"))
    folder = posttrain.run(posttrain.load_recipe("r.yaml", ["name=other"])).folder
    assert folder == tmp_path / "runs" / "other"
    assert (folder / "sft" / "final" / "model_index.json").is_file()


@pytest.mark.parametrize(("evaluation", "every", "steps"), [(EVALUATION, 4, [0, 4, 6]), ("", 6, [0, 6])])
def test_image_grids_are_drawn_before_during_and_after_training(tmp_path, evaluation, every, steps):
    every = TRAIN.replace("sample_every: null", f"sample_every: {every}")
    printed = recipe(stage("sft", train=every), evaluation=evaluation)
    run_quietly(printed, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "sft" / "samples").iterdir())
    assert names == [f"step-{step:08d}.png" for step in steps]
    account = json.loads((tmp_path / "run" / "sft" / "stage.json").read_text())
    assert account["forward_equivalents"] == 20 * 3  # samples are not training's bill


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_like_the_cpu(tmp_path):
    made = recipe(stage("soar", SOAR), overrides=["tf32=false"])
    run_quietly(made, tmp_path / "cpu")
    run_quietly(made.model_copy(update={"device": "cuda"}), tmp_path / "cuda")
    a, b = (read_metrics(tmp_path / n / "soar" / "metrics.jsonl") for n in ("cpu", "cuda"))
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], rel=1e-3)


def test_the_quickstart_recipe_compares_base_sft_and_soar(tmp_path):
    """The shipped recipe, model and settings; only the counts are smaller."""
    small = {"steps": 2, "warmup_steps": 0, "batch_size": 4}
    overrides = [f"stages.{s}.train.{k}={v}" for s in ("sft", "soar") for k, v in small.items()]
    overrides += [f"stages.{s}.data.images=24" for s in ("sft", "soar")]
    made = load_recipe("quickstart", [*overrides, "evaluation.prompts.count=6", "evaluation.steps=2"])
    printed = run_quietly(made, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    for name in ("base", "sft", "soar"):
        assert (tmp_path / "run" / name / "evaluation" / "eval.json").is_file()
        assert f"\n{name} " in printed
    accounts = [json.loads((tmp_path / "run" / n / "stage.json").read_text()) for n in ("sft", "soar")]
    assert accounts[0]["samples"] == accounts[1]["samples"] == 8
    assert list((tmp_path / "run" / "soar" / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_a_checkpoint_is_opened_with_the_weights_that_are_asked_for(finished, name):
    folder, _, _ = finished
    step = str(folder / name / "checkpoints" / "step-00000006")
    model, kind = open_artifact(step, CPU)
    assert kind == "ema"
    wrote, _ = open_artifact(str(folder / name), CPU)
    # the artifact of a LoRA is merged, the checkpoint's is beside the weights
    x, sigma = torch.randn(2, *model.latent_shape(16, 16)), torch.tensor([0.3, 0.8])
    condition = model.encode_prompts(["a circle", "a square"])
    with torch.no_grad():
        same = model.velocity(x, sigma, condition)
        torch.testing.assert_close(same, wrote.velocity(x, sigma, condition), atol=1e-4, rtol=1e-4)
        raw, kind = open_artifact(step, CPU, weights="raw")
        assert kind == "raw"
        assert (raw.velocity(x, sigma, condition) - same).abs().max() > 1e-4


def test_what_is_no_checkpoint_or_not_finished_is_said(finished, tmp_path):
    folder, _, _ = finished
    with pytest.raises(ModelError, match="--weights is for a checkpoint"):
        open_artifact(str(folder / "sft"), CPU, weights="raw")
    with pytest.raises(ModelError, match="--base is for a LoRA that was written"):
        open_artifact(str(folder / "sft" / "checkpoints" / "step-00000006"), CPU, "elsewhere")
    shutil.copytree(folder / "sft", tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft" / "final")
    (tmp_path / "sft" / "checkpoints" / "step-00000008.damaged").mkdir()
    with pytest.raises(
        ModelError, match=r"is not finished; give a checkpoint of it, such as .*step-00000006'"
    ):
        open_artifact(str(tmp_path / "sft"), CPU)
    lost = tmp_path / "a" / "b" / "checkpoints" / "step-00000006"
    shutil.copytree(folder / "sft" / "checkpoints" / "step-00000006", lost)
    with pytest.raises(ModelError, match="does not say by which recipe it was made"):
        open_artifact(str(lost), CPU)


def test_base_beside_what_is_no_lora_names_what_is_there(tmp_path):
    for names, found in (
        ((), "holds no weights"),
        (("adapter_model.safetensors",), "holds 'adapter_model.safetensors'"),
        (("adapter_model.safetensors", "model_index.json"), "is a whole pipeline"),
    ):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
        words = re.escape(f"with pytorch_lora_weights.safetensors; {str(folder)!r} {found}")
        with pytest.raises(ModelError, match=words + "$"):
            open_artifact(str(folder), CPU, base="posttrain/tiny-sd3")


def test_the_shipped_model_says_how_it_was_made_and_is_small():
    import hashlib

    from posttrain.weights.pipeline_folder import ASSETS

    folder = ASSETS / "tiny-sd3"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    provenance = json.loads((folder / "provenance.json").read_text())
    weights_ = {f.relative_to(folder).as_posix(): f for f in files if f.suffix == ".safetensors"}
    assert provenance["sha256"].keys() == weights_.keys()
    for name, file in weights_.items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == provenance["sha256"][name]
    model, _ = open_artifact("posttrain/tiny-sd3", CPU)
    assert model.spec.max_sequence_length == 16
