"""A run folder takes a changed recipe as far as nothing that was trained would differ, and says what is not so."""

import json
import shutil

import pytest
from runs import EVALUATION, TRAIN, recipe, stage

from posttrain.errors import PosttrainError, RecipeError
from posttrain.recipe.deciding import fingerprint
from posttrain.recipe.file import dump_recipe, overridden
from posttrain.stages.adjust import adjust, reopen
from posttrain.stages.fresh import begin_anew, to_begin_anew
from posttrain.stages.stage_state import as_trained

COSINE = TRAIN.replace("}", ", schedule: cosine}")
CHAIN = recipe(
    stage("sft"),
    stage("soar", "{type: soar}", train=COSINE),
    stage("side", start_from="base"),
    evaluation=EVALUATION,
)
STEPS = 6


def made_run(folder, **states):
    """The folder of a run of CHAIN: each stage has so many steps, or is "done"."""
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "recipe.yaml").write_text(dump_recipe(CHAIN))
        add_checkpoint(folder / name, STEPS if state == "done" else state)
        if state == "done":
            finish(folder / name, STEPS)
    (folder / "recipe.yaml").write_text(dump_recipe(CHAIN))
    return folder


def add_checkpoint(folder, step):
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{step:08d}" / "state.pt").touch()


def finish(folder, steps):
    (folder / "stage.json").write_text(json.dumps({"steps": steps}))
    (folder / "final").mkdir()
    description = {"model": {}, "parents": [], "stage": {}, "weights": "ema"}
    (folder / "final" / "posttrain.json").write_text(json.dumps(description))
    (folder / "final" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "eval.json").touch()


def adjusted(folder, *overrides):
    notes = []
    reopened = adjust(folder, overridden(CHAIN, overrides), notes.append)
    assert all((folder / name / "stage.json").is_file() for name in reopened), "it waits for its turn"
    for name, ended in reopened.items():
        assert ended is None
        reopen(folder / name, notes.append)
    return notes


def removed(folder, names, recipe_=CHAIN):
    """What --fresh says of these stages, after it removed them."""
    notes = []
    begin_anew(folder, to_begin_anew(folder, recipe_, names), notes.append)
    return notes


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SFT, SOAR = "stages.sft.train", "stages.soar.train"
FREE_CHANGES = [
    # the stages of the run, and what is changed
    ({}, ["model.path=elsewhere", "seed=3", f"{SFT}.learning_rate=1", f"{SFT}.steps=1"]),  # it never trained
    ({"sft": "done"}, [f"{SOAR}.learning_rate=1", f"{SOAR}.steps=1", "stages.side.algorithm={type: soar}"]),
    ({"sft": "done", "soar": "done"}, [f"{SFT}.micro_batch=1", f"{SFT}.log_every=3", "tracker=tensorboard"]),
    ({"sft": "done", "soar": 4}, [f"{SOAR}.keep_checkpoints=9", f"{SOAR}.checkpoint_every=1", "device=auto"]),
    ({"sft": "done"}, ["evaluation.prompts.count=3"]),  # evaluations are compared when it is their turn
    ({"sft": "done"}, ["evaluation=null"]),
    ({"soar": 4}, [f"{SOAR}.steps=6", "stages.soar.export_dtype=bf16"]),
    ({"side": 4}, [f"{SFT}.learning_rate=1"]),  # it starts from base
]


@pytest.mark.parametrize(("states", "overrides"), FREE_CHANGES)
def test_what_changes_no_result_is_taken_in_silence(tmp_path, states, overrides):
    before = snapshot(made_run(tmp_path, **states))
    assert adjusted(tmp_path, *overrides) == []
    assert snapshot(tmp_path) == before


def test_a_checkpoint_from_before_the_first_step_claims_nothing(tmp_path):
    made_run(tmp_path, sft=0)
    before = snapshot(tmp_path)
    assert adjusted(tmp_path) == []
    assert snapshot(tmp_path) == before
    assert adjusted(tmp_path, f"{SFT}.learning_rate=1") == []
    assert not (tmp_path / "sft" / "checkpoints").exists()


STEP_CHANGES = [
    # steps taken or "done", new steps, stage, words; None if it is refused
    (4, 9, "sft", "(was 6, now 9): the stage ends after step 9"),
    (4, 4, "sft", "(was 6, now 4): the stage ends after step 4"),
    (4, 5, "soar", "(was 6, now 5): from step 5 on the learning rate follows the cosine schedule over 5 steps; the"),
    (4, 4, "soar", "(was 6, now 4): the stage ends after step 4"),
    (4, 3, "sft", None),
    ("done", 5, "sft", None),
    ("done", 8, "sft", "(was 6, now 8): the stage ends after step 8"),
    ("done", 8, "soar", "(was 6, now 8): from step 7 on the learning rate follows the cosine schedule over 8 steps"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "steps", "name", "words"), STEP_CHANGES)
def test_steps_grow_and_shrink_to_what_is_done(tmp_path, state, steps, name, words):
    made_run(tmp_path, **{name: state})
    override = f"stages.{name}.train.steps={steps}"
    if words is None:
        done = STEPS if state == "done" else state
        with pytest.raises(
            RecipeError, match=rf"train\.steps \(was 6, now {steps}\): {done} steps are taken"
        ):
            adjusted(tmp_path, override)
        return
    notes = adjusted(tmp_path, override)
    assert notes[0].startswith(f"stages.{name}.train.steps {words}")
    assert not (tmp_path / name / "stage.json").exists()
    if state == "done":  # it goes on from its last checkpoint; the evaluation was of other weights
        assert notes[1:] == [
            f"{name}: is evaluated again; the evaluation of other weights is kept as evaluation-1"
        ]
        assert (tmp_path / name / "evaluation-1" / "eval.json").is_file()
        assert not (tmp_path / name / "evaluation").exists()


def test_weights_are_exported_anew_in_another_dtype(tmp_path):
    made_run(tmp_path, sft="done")
    assert len(adjusted(tmp_path, "stages.sft.export_dtype=bf16")) == 1
    assert not (tmp_path / "sft" / "stage.json").exists()


def test_another_name_of_the_same_dtype_and_that_of_a_stage_before_change_nothing(tmp_path):
    before = snapshot(made_run(tmp_path, sft="done", soar=2))
    assert (
        adjusted(tmp_path, "stages.sft.export_dtype=fp32") == []
    )  # as the base, so it is 'auto' by another name
    assert snapshot(tmp_path) == before
    assert adjusted(tmp_path, "stages.sft.export_dtype=bf16")
    assert (tmp_path / "soar" / "checkpoints").is_dir(), "soar started from the exact weights"


def test_a_finished_stage_without_its_last_checkpoint_cannot_go_on(tmp_path):
    made_run(tmp_path, sft="done")
    shutil.rmtree(tmp_path / "sft" / "checkpoints")
    before = snapshot(tmp_path)
    with pytest.raises(
        RecipeError, match=r"now 8\): the stage is finished, and its checkpoint of step 6 is gone"
    ):
        adjusted(tmp_path, "stages.sft.train.steps=8")
    with pytest.raises(
        RecipeError, match=r"export_dtype: the stage is finished, and its checkpoint of step 6"
    ):
        adjusted(tmp_path, "stages.sft.export_dtype=bf16")
    assert snapshot(tmp_path) == before
    assert adjusted(tmp_path) == []


def test_steps_of_a_stage_that_an_alarm_ended_have_no_effect_on_it_or_its_children(tmp_path):
    made_run(tmp_path, sft="done", soar="done")
    (tmp_path / "sft" / "stage.json").write_text('{"steps": 4}')
    for steps in (2, 9):
        (note,) = adjusted(tmp_path, f"stages.sft.train.steps={steps}")
        assert note.endswith(f"now {steps}): no effect, the stage ended early, after step 4")
    assert (tmp_path / "sft" / "stage.json").exists()


def test_a_stage_that_an_alarm_ended_is_not_exported_anew(tmp_path):
    made_run(tmp_path, side="done")
    (tmp_path / "side" / "stage.json").write_text('{"steps": 4}')
    (note,) = adjusted(tmp_path, "stages.side.export_dtype=bf16")
    assert note == (
        "stages.side.export_dtype (was 'fp32', now 'bf16'): no effect, the stage ended early, after step 4"
    )


def test_stages_that_ended_early_keep_the_steps_by_which_they_were_trained(tmp_path):
    made_run(tmp_path, sft="done", soar="done", side=4)
    (tmp_path / "sft" / "stage.json").write_text('{"steps": 4}')
    longer = overridden(CHAIN, [f"stages.{name}.train.steps=9" for name in ("sft", "soar", "side")])
    assert [s.train.steps for s in as_trained(longer, tmp_path).stages] == [STEPS, 9, 9]
    assert fingerprint(as_trained(longer, tmp_path), "soar") == fingerprint(CHAIN, "soar")


REFUSED = [
    # stages of the run, what is changed, fields that are named, stages to begin anew
    ({"sft": 2}, [f"{SFT}.learning_rate=1"], [f"{SFT}.learning_rate (was 0.001, now 1"], ["sft"]),
    ({"sft": "done", "soar": 2}, [f"{SFT}.ema=0.5"], [f"{SFT}.ema (was 0.9, now 0.5)"], ["sft"]),
    ({"sft": "done", "soar": 2}, [f"{SFT}.steps=8"], [f"{SFT}.steps (was 6, now 8)"], ["soar"]),
    ({"sft": "done", "soar": 2, "side": "done"}, ["seed=1"], ["seed (was 0, now 1)"], ["sft", "side"]),
    ({"sft": 2}, ["model.path=x"], ["model.path (was "], ["sft"]),
    (
        {"soar": 2},
        ["stages.soar.start_from=base"],
        ["stages.soar.start_from (was 'sft', now 'base')"],
        ["soar"],
    ),
    (
        {"side": 2},
        ["stages.side.start_from=sft"],
        ["stages.side.start_from (was 'base', now 'sft')"],
        ["side"],
    ),
    ({"side": 2, "sft": 2}, ["stages.side.data.seed=5"], ["stages.side.data.seed (was 1, now 5)"], ["side"]),
]


@pytest.mark.parametrize(("states", "overrides", "fields", "names"), REFUSED)
def test_what_would_change_is_refused_by_a_short_list_and_the_command_that_begins_anew(
    tmp_path, states, overrides, fields, names
):
    before = snapshot(made_run(tmp_path, **states))
    with pytest.raises(RecipeError) as caught:
        adjusted(tmp_path, *overrides)
    head, *lines, last = str(caught.value).split("\n")
    assert head == f"{str(tmp_path)!r} was trained with other settings:"
    assert len(lines) == len(fields)
    assert all(field in line for field, line in zip(fields, lines, strict=True))
    assert last.endswith("posttrain run RECIPE " + " ".join(f"--fresh {name}" for name in names))
    assert snapshot(tmp_path) == before


def test_a_refusal_stays_short(tmp_path):
    made_run(tmp_path, sft="done", soar="done", side="done")
    changes = [f"stages.{name}.train.{field}" for name in ("sft", "side") for field in (
        "learning_rate=5", "weight_decay=5", "eps=5", "max_grad_norm=5", "ema=0.5", "batch_size=50",
    )]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        adjusted(tmp_path, *changes, f"stages.side.data={{images: {'a' * 500}.jsonl}}")
    assert len(str(caught.value)) < 1000
    assert "\n  and 5 more\n" in str(caught.value)
    assert len(str(caught.value).split("\n")) == 1 + 8 + 1 + 1
    with pytest.raises(RecipeError) as caught:
        adjusted(tmp_path, *changes[:8])
    assert "more" not in str(caught.value)


def test_a_stage_is_compared_with_its_own_steps(tmp_path):
    made = overridden(CHAIN, ["stages.soar.train.steps=8"])
    made_run(tmp_path, soar=4)
    (tmp_path / "soar" / "recipe.yaml").write_text(dump_recipe(made))
    notes = []
    adjust(tmp_path, made, notes.append)
    assert notes == []


def test_a_run_of_a_version_without_recipes_of_stages_is_read(tmp_path):
    made_run(tmp_path, sft="done", soar=4)
    for name in ("sft", "soar"):
        (tmp_path / name / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"stages\.sft\.train\.ema"):
        adjusted(tmp_path, "stages.sft.train.ema=0.5")
    assert len(adjusted(tmp_path, f"{SOAR}.steps=9")) == 1
    (tmp_path / "recipe.yaml").write_text("overwritten")  # from now on the stages tell
    with pytest.raises(RecipeError, match=r"stages\.sft\.train\.ema"):
        adjusted(tmp_path, "stages.sft.train.ema=0.5")


@pytest.mark.parametrize("content", ["", "name: x", "a: [", "\x00", None])
def test_a_stage_that_does_not_tell_by_which_recipe_it_was_trained_is_refused(tmp_path, content):
    made_run(tmp_path, sft=4)
    for file in (tmp_path / "recipe.yaml", tmp_path / "sft" / "recipe.yaml"):
        file.unlink()
        if content is not None:
            file.write_text(content)
    why = "there is no recipe.yaml" if content is None else f"{tmp_path / 'sft' / 'recipe.yaml'}"
    with pytest.raises(RecipeError, match="does not say by which recipe it was made") as caught:
        adjusted(tmp_path)
    assert f"({why}" in str(caught.value)
    assert "posttrain run RECIPE --fresh sft" in str(caught.value)
    removed(tmp_path, ["sft"])
    assert adjusted(tmp_path) == []


@pytest.mark.parametrize("damage", ["stage.json", "final/posttrain.json", "final/model.safetensors", "final"])
def test_results_that_are_damaged_or_gone_are_made_again_from_the_checkpoint(tmp_path, damage):
    made_run(tmp_path, sft="done")
    path = tmp_path / "sft" / damage
    shutil.rmtree(path) if path.is_dir() else path.write_text("")
    (note,) = adjusted(tmp_path)
    file = path / "posttrain.json" if damage == "final" else path
    assert note.startswith("sft: ")
    assert str(file) in note
    assert note.endswith("what the stage wrote is made again from its checkpoint of step 6")
    assert not (tmp_path / "sft" / "stage.json").exists()
    finish_again = tmp_path / "sft" / "stage.json"
    finish_again.write_text("{")
    shutil.rmtree(tmp_path / "sft" / "checkpoints")
    with pytest.raises(PosttrainError, match=r"stage\.json' is damaged: .*no checkpoint.*--fresh sft"):
        adjusted(tmp_path)


def test_weights_that_are_gone_are_made_again(tmp_path):
    made_run(tmp_path, sft="done")
    (tmp_path / "sft" / "final" / "model.safetensors").unlink()
    (note,) = adjusted(tmp_path)
    assert "final' holds no weights; what the stage wrote is made again" in note


@pytest.mark.parametrize("damage", ["gone", "a shard"])
def test_weights_of_the_transformer_alone_may_be_gone(tmp_path, damage):
    """The encoders' weights beside them are no sign that the stage's own are there."""
    made_run(tmp_path, sft="done")
    final = tmp_path / "sft" / "final"
    (final / "vae").mkdir()
    (final / "model.safetensors").rename(final / "vae" / "model.safetensors")
    (final / "model_index.json").write_text('{"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}')
    (final / "transformer").mkdir()
    if damage == "a shard":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (final / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    (note,) = adjusted(tmp_path)
    assert "/transformer" in note
    assert "what the stage wrote is made again from its checkpoint of step 6" in note


def test_an_evaluation_of_the_base_model_is_of_the_model_that_it_names(tmp_path):
    made_run(tmp_path)
    (tmp_path / "base" / "evaluation").mkdir(parents=True)
    (tmp_path / "base" / "evaluation" / "eval.json").touch()
    assert adjusted(tmp_path) == []
    assert (tmp_path / "base" / "recipe.yaml").is_file()
    (tmp_path / "base" / "recipe.yaml").unlink()
    (tmp_path / "recipe.yaml").unlink()
    (note,) = adjusted(tmp_path)  # it does not tell
    assert note == "base: is evaluated again; the evaluation of other weights is kept as evaluation-1"
    (tmp_path / "base" / "evaluation-1").rename(tmp_path / "base" / "evaluation")
    (tmp_path / "base" / "recipe.yaml").write_text(dump_recipe(CHAIN))
    (note,) = adjusted(tmp_path, "model.path=elsewhere")
    assert note == "base: is evaluated again; the evaluation of other weights is kept as evaluation-1"


def test_an_evaluation_without_the_weights_that_it_was_of_is_put_aside(tmp_path):
    made_run(tmp_path, sft="done")
    shutil.rmtree(tmp_path / "sft" / "checkpoints")
    (tmp_path / "sft" / "stage.json").unlink()
    assert adjusted(tmp_path) == [
        "sft: is evaluated again; the evaluation of other weights is kept as evaluation-1"
    ]


def test_a_stage_begins_anew_with_those_that_were_trained_from_it_and_no_others(tmp_path):
    made_run(tmp_path, sft="done", soar="done", side="done")
    (tmp_path / "base").mkdir()
    assert removed(tmp_path, []) == []
    notes = removed(tmp_path, ["sft"])
    assert notes == [f"{name}: removed what it wrote; it begins anew" for name in ("soar", "sft")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "recipe.yaml", "side"]
    with pytest.raises(RecipeError, match=r"--fresh sfd: no such stage.*'sft'.*; there are base, sft, soar, side"):  # fmt: skip
        removed(tmp_path, ["sfd"])
    assert len(removed(tmp_path, ["base"])) == 2, "all were trained from the base model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_what_begins_anew_is_neither_read_nor_compared(tmp_path):
    made_run(tmp_path, sft="done", side="done")
    (tmp_path / "sft" / "stage.json").write_text("damaged")
    shutil.rmtree(tmp_path / "sft" / "checkpoints")
    other, notes = overridden(CHAIN, [f"{SFT}.learning_rate=1"]), []
    adjust(tmp_path, other, notes.append, ["sft"])
    assert notes == []
    with pytest.raises(RecipeError, match=r"side\.train\.ema .*\n.*--fresh side"):
        adjust(tmp_path, overridden(CHAIN, ["stages.side.train.ema=0.5"]), notes.append, ["sft"])


def test_a_stage_that_left_the_recipe_begins_anew_with_its_parent(tmp_path):
    made_run(tmp_path, sft="done", soar="done", side="done")
    shorter = recipe(stage("sft"), stage("side", start_from="base"), evaluation=EVALUATION)
    removed(tmp_path, ["sft"], shorter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "side"]
