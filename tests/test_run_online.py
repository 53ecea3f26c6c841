"""Tests that online stages chain, keep their reference, resume exactly, and record what they did."""

import json
import shutil
import sys
import types

import pytest
import torch
from runs import EVALUATION, cut_off_after, recipe, run_quietly, stage
from stored import whole_state

from posttrain.engine.checkpoint_folder import saved
from posttrain.engine.monitor import collapsed, hacking
from posttrain.engine.tracker import read_metrics
from posttrain.errors import RewardError, TrainingError
from posttrain.stages.hooks import groups_alike

LORA = "{type: lora, rank: 2, alpha: 4}"
SOAR = "{type: soar, trajectory_length: 1}"
GRPO = "{type: flow_grpo, group_size: 4, num_steps: 4, guidance_scale: 2.0}"
NFT = "{type: diffusion_nft, group_size: 4, num_steps: 4}"
AWM = "{type: awm, group_size: 4, num_steps: 4, train_timesteps: 2, off_policy: true}"
PROMPTS = "{prompts: {type: shapes, count: 12}, resolution: 16}"
TRAIN = (
    "{steps: 4, batch_size: 8, steps_per_batch: 2, micro_batch: 8, learning_rate: 1e-2, checkpoint_every: 2, "
    "log_every: 1, sample_every: null}"
)


def online(name, algorithm=GRPO, train=TRAIN, rewards="brightness_of:score", **fields):
    made = stage(name, algorithm, train, rewards=f"['{rewards}']", **fields)
    return made.replace("{type: shapes, images: 10, seed: 1}", PROMPTS)


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    module = types.ModuleType("brightness_of")
    module.__spec__ = types.SimpleNamespace(name="brightness_of")
    module.calls = []

    def score(images, prompts, metadata):
        module.calls.append((len(prompts), metadata))
        return images.mean((1, 2, 3))

    module.score = score
    monkeypatch.setitem(sys.modules, "brightness_of", module)
    return module


ROUNDING = 1e-10
"""A KL below it is 0 but for rounding: a row's place in a micro-batch may change its last digit, on some CPUs."""


def first_kl(folder, name):
    return read_metrics(folder / name / "metrics.jsonl")[0]["kl"]


@pytest.mark.parametrize("before", ["merge", "stack"])
def test_the_reference_is_the_stage_before_or_what_the_recipe_names(tmp_path, before, recwarn):
    """After soar (LoRA) then grpo (LoRA), the KL at step 0 is 0 to soar, and not to base."""
    lora = f"{{type: lora, rank: 2, alpha: 4, before: {before}}}"
    made = recipe(
        stage("soar", SOAR, TRAIN.replace("steps: 4,", "steps: 6,"), tune=LORA),
        online("to-soar", start_from="soar", reference="soar", tune=lora),
        online("to-parent", start_from="soar", tune=lora),
        online("to-base", start_from="soar", reference="base", tune=lora),
        online("full-to-base", start_from="soar", reference="base"),
        online("nft-to-base", NFT, start_from="to-base", reference="base", tune=lora),
    )
    run_quietly(made, tmp_path / "run")
    assert first_kl(tmp_path / "run", "to-soar") < ROUNDING
    assert first_kl(tmp_path / "run", "to-parent") < ROUNDING
    assert first_kl(tmp_path / "run", "to-base") > 1000 * ROUNDING
    full = first_kl(tmp_path / "run", "full-to-base")
    assert full == pytest.approx(first_kl(tmp_path / "run", "to-base"), rel=1e-2)
    assert first_kl(tmp_path / "run", "nft-to-base") > 1000 * ROUNDING
    assert not any("peft_config" in str(w.message) for w in recwarn), "peft advises against stacking"


def test_a_lora_named_by_its_folder_brings_its_parents(tmp_path):
    """base -> soar (LoRA) -> grpo (LoRA), and then another run from the folder of the last."""
    chain = recipe(
        stage("soar", SOAR, TRAIN, tune=LORA), online("grpo", tune=LORA), online("more", tune=LORA)
    )
    run_quietly(chain, tmp_path / "one")
    final = tmp_path / "one" / "grpo" / "final"
    other = recipe(online("more", tune=LORA, start_from=str(final)))
    run_quietly(other, tmp_path / "two")
    held = recipe(
        online("more", tune=LORA, start_from=str(final), reference=str(tmp_path / "one" / "soar" / "final"))
    )
    run_quietly(held, tmp_path / "three")
    from posttrain.stages.artifact import open_artifact

    opened, _ = open_artifact(str(tmp_path / "two" / "more"), torch.device("cpu"))
    assert (
        len(json.loads((tmp_path / "two" / "more" / "final" / "posttrain.json").read_text())["parents"]) == 2
    )
    assert opened is not None
    assert first_kl(tmp_path / "two", "more") < ROUNDING
    assert first_kl(tmp_path / "three", "more") > 1000 * ROUNDING


def test_a_stacked_adapter_starts_from_the_very_model_that_a_merged_one_does(tmp_path):
    lora = "{type: lora, rank: 2, alpha: 4, before: "
    made = recipe(
        stage("soar", SOAR, TRAIN, tune=LORA),
        online("merged", start_from="soar", tune=lora + "merge}"),
        online("stacked", start_from="soar", tune=lora + "stack}"),
    )
    run_quietly(made, tmp_path / "run")
    one, two = (read_metrics(tmp_path / "run" / n / "metrics.jsonl")[0] for n in ("merged", "stacked"))
    assert one["reward"] == pytest.approx(two["reward"], abs=1e-5)


@pytest.mark.parametrize("algorithm", [GRPO, NFT, AWM])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(tmp_path, algorithm, monkeypatch):
    made = recipe(online("rl", algorithm, TRAIN.replace("steps: 4,", "steps: 6,")), evaluation=EVALUATION)
    run_quietly(made, tmp_path / "whole")
    cut_off_after(5, made, tmp_path / "cut", monkeypatch)
    run_quietly(made, tmp_path / "cut")
    states = [whole_state(saved(tmp_path / n / "rl" / "checkpoints")[-1]) for n in ("whole", "cut")]
    for name, tensor in states[0]["trained"].items():
        assert torch.equal(tensor, states[1]["trained"][name])
    assert "reference" not in states[0]["roles"], "a role that never moves is not kept twice"
    assert [r["step"] for r in read_metrics(tmp_path / "cut" / "rl" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_records_what_its_samples_earned(tmp_path, brightness):
    run_quietly(recipe(online("rl")), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "rl" / "metrics.jsonl")
    for key in (
        "reward",
        "reward/score",
        "reward_group_std",
        "groups_without_spread",
        "ratio",
        "kl",
        "item_bytes",
    ):
        assert key in rows[0], key
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert rows[1]["ratio_deviation"] > 0, "the second step on a batch is off its policy"
    assert sum(rows[0]["advantages"]["counts"]) == 8
    account = json.loads((tmp_path / "run" / "rl" / "stage.json").read_text())
    assert (account["samples"], account["updates"]) == (16, 4)
    rows = [row for n, metadata in brightness.calls for row in metadata]
    assert len(rows) == 16
    assert all("include" in row for row in rows)


def test_a_reward_that_fails_stops_the_run_and_keeps_what_it_failed_on(tmp_path, brightness):
    brightness.score = lambda images, prompts, metadata: [float("nan")] * len(prompts)
    words = (
        r"rl, step 3: .*reward 'score' returned nan for prompt 'a photo .*failed_reward.*refused_steps\.jsonl"
    )
    with pytest.raises(TrainingError, match=words):
        run_quietly(recipe(online("rl")), tmp_path / "run")
    lines = (tmp_path / "run" / "rl" / "refused_steps.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1] * 8 + [2] * 8 + [3] * 8
    kept = (tmp_path / "run" / "rl" / "failed_reward" / "prompts.jsonl").read_text().splitlines()
    assert len(kept) == 8
    assert (tmp_path / "run" / "rl" / "failed_reward" / json.loads(kept[0])["image"]).is_file()
    brightness.score = lambda images, prompts, metadata: [1.0]
    with pytest.raises(RewardError, match="for 8 images"):
        run_quietly(recipe(online("rl")), tmp_path / "run")


def test_a_stage_whose_groups_never_differ_is_an_error(tmp_path, brightness):
    brightness.score = lambda images, prompts, metadata: [1.0] * len(prompts)
    with pytest.raises(TrainingError, match="trained nothing: no group of samples had a spread"):
        run_quietly(recipe(online("rl")), tmp_path / "run")


def test_a_stage_says_early_that_groups_do_not_differ(tmp_path, brightness, monkeypatch):
    """Once, after as many batches in a row as are asked for; one that differs begins the count anew."""
    monkeypatch.setattr(groups_alike, "BATCHES", 2)
    spread, calls = [False, True, False, False, False], []

    def score(images, prompts, metadata):
        calls.append(None)
        differs = spread[min(len(calls) - 1, 4)]
        return [float(i) if differs else 1.0 for i in range(len(prompts))]

    brightness.score = score
    train = TRAIN.replace("steps: 4", "steps: 5").replace("steps_per_batch: 2", "steps_per_batch: 1")
    said = " ".join(run_quietly(recipe(online("rl", train=train)), tmp_path / "run").split())
    assert said.count("no two samples of a prompt had different rewards") == 1
    assert "rl, step 4: in 2 batches no two samples" in said


def test_held_out_scores_are_read_and_an_alarm_acts(tmp_path, brightness):
    """The spread within groups is made to vanish after ten batches."""
    train = "{steps: 14, batch_size: 8, micro_batch: 8, learning_rate: 1e-3, log_every: 1, checkpoint_every: 4, sample_every: null}"

    def score(images, prompts, metadata):
        brightness.calls.append((len(prompts), metadata))
        scale = 1.0 if len(brightness.calls) <= 8 else 1e-4
        return scale * images.mean((1, 2, 3))

    brightness.score = score
    monitor = "{every: 2, prompts: 4, spread_collapse: ACTION, reward_hacking: ACTION}"

    def run(action):
        brightness.calls.clear()
        made = recipe(
            online("rl", train=train, monitor=monitor.replace("ACTION", action)), evaluation=EVALUATION
        )
        printed = run_quietly(made, tmp_path / action)
        return printed, json.loads((tmp_path / action / "rl" / "stage.json").read_text())

    printed, account = run("warn")
    assert account["steps"] == 14
    assert "spread_collapse: the reward's spread within groups fell" in printed
    rows = read_metrics(tmp_path / "warn" / "rl" / "metrics.jsonl")
    assert [r["step"] for r in rows if "heldout/shapes" in r] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert any("alarm/spread_collapse" in r for r in rows)
    with pytest.raises(TrainingError, match=r"spread_collapse.*monitor.spread_collapse: stop"):
        run("stop")
    printed, account = run("rollback")
    assert "rolled back to step" in printed
    assert account["steps"] < 14
    last = saved(tmp_path / "rollback" / "rl" / "checkpoints")[-1]
    assert last.name == f"step-{account['steps']:08d}"
    shutil.rmtree(tmp_path / "rollback" / "rl" / "final")
    printed, again = run("rollback")
    assert f"what the stage wrote is made again from its checkpoint of step {account['steps']}" in printed
    same = {name: again[name] for name in again if name != "peak_memory_bytes"}
    assert same == {name: account[name] for name in same}
    assert brightness.calls == [], "it is published, and not trained until the same alarm"
    assert [*(tmp_path / "rollback" / "rl" / "final").rglob("*transformer*/*.safetensors")]


def test_reward_hacking_is_a_rising_reward_and_a_falling_score():
    good = {"score": [0.5, 0.6, 0.7, 0.6]}
    worse = {"score": [0.3, 0.4, 0.45, 0.5]}
    noisy = {"score": [0.1, 0.9, 0.9, 0.4]}
    assert "'score' became worse by 0.1875" in hacking([0.1, 0.2, 0.3], [good, good, worse], 3)
    assert hacking([0.1, 0.2, 0.3], [good, good, noisy], 3) is None, "within the noise"
    assert hacking([0.3, 0.2, 0.1], [good, good, worse], 3) is None, "the reward fell too"
    assert hacking([float("-inf"), 0.1], [good, worse], 2) is None, "there was no reward before"
    assert hacking([0.1, 0.2], [good, worse], 3) is None, "too few readings"


def test_a_collapse_is_a_small_part_of_the_first_spread():
    assert "fell from 0.2 to 0.01" in collapsed([0.2] * 5 + [0.01] * 5, 0.1)
    assert collapsed([0.2] * 5 + [0.05] * 5, 0.1) is None
    assert collapsed([0.2] * 4 + [0.01] * 5, 0.1) is None
