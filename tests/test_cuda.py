"""On a CUDA device every kind of stage trains, resumes to the same bits, and lives with the memory there is."""

import functools

import pytest
import torch
from runs import TRAIN, cut_off_after, recipe, run_quietly, stage
from stored import whole_state
from test_compiling import _as_before  # noqa: F401
from test_run import assert_equal_weights
from toys import alone

from posttrain.algorithm import Batch, Tools
from posttrain.algorithms.sft import SFT
from posttrain.condition import Conditions
from posttrain.engine.tracker import read_metrics
from posttrain.engine.trainer import update
from posttrain.optim.settings import Train
from posttrain.parallel import single
from posttrain.parallel.single import Alone
from posttrain.policy import Policy
from posttrain.policy.out_of_memory import halve_until_it_fits
from posttrain.stages.artifact import open_artifact
from posttrain.support.randomness import Draws

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SOAR = "{type: soar, trajectory_length: 2}"
GRPO = "{type: flow_grpo, group_size: 2, num_steps: 4, guidance_scale: 2.0}"
NFT = "{type: diffusion_nft, group_size: 2, num_steps: 4}"
LORA = "{type: lora, rank: 2, alpha: 4}"
PROMPTS = "{prompts: {type: shapes, count: 12}, resolution: 16}"
ONE = "{steps: 1, batch_size: 4, micro_batch: 4, learning_rate: 1e-3, log_every: 1, sample_every: null}"


def made(name, algorithm="{type: sft}", train=TRAIN, **fields):
    text = stage(name, algorithm, train, **fields)
    if algorithm in (GRPO, NFT):
        text = stage(name, algorithm, train, rewards="['brightness:score']", **fields)
        text = text.replace("{type: shapes, images: 10, seed: 1}", PROMPTS)
    return recipe(text, overrides=["tf32=false", f"device={DEVICE}"])


def moments(folder):
    """The optimizer's state, trained weights and roles of the last checkpoint."""
    (last,) = sorted((folder / "checkpoints").iterdir())[-1:]
    return whole_state(last)


@pytest.mark.parametrize("tune", ["{type: full}", LORA])
@pytest.mark.parametrize("algorithm", [SOAR, GRPO, NFT])
def test_the_same_run_gives_the_same_bits_cut_off_or_not(tmp_path, monkeypatch, algorithm, tune):
    run = made("only", algorithm, tune=tune)
    run_quietly(run, tmp_path / "whole")
    run_quietly(run, tmp_path / "again")

    cut_off_after(5, run, tmp_path / "cut", monkeypatch)
    run_quietly(run, tmp_path / "cut")
    first, again, resumed = (moments(tmp_path / n / "only")["trained"] for n in ("whole", "again", "cut"))
    assert_equal_weights(first, again)  # else no resume could give them
    assert_equal_weights(first, resumed)


@pytest.mark.parametrize("tune", ["{type: full}", LORA])
@pytest.mark.parametrize("algorithm", [GRPO, NFT])
def test_an_iteration_in_bf16_takes_a_finite_step(tmp_path, algorithm, tune):
    run_quietly(made("only", algorithm, ONE.replace("{", "{precision: bf16, "), tune=tune), tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "only" / "metrics.jsonl")
    assert 0 < row["grad_norm"] < float("inf")
    assert row.get("ratio", 1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("algorithm", "tune"), [("{type: sft}", "{type: full}"), (SOAR, LORA)])
def test_compiled_blocks_train_as_plain_ones(tmp_path, algorithm, tune):
    run_quietly(made("only", algorithm, ONE, tune=tune), tmp_path / "plain")
    compiled = ONE.replace("{", "{compile: true, ")
    printed = run_quietly(made("only", algorithm, compiled, tune=tune), tmp_path / "compiled")
    assert "the blocks run as they are" not in printed
    a, b = (read_metrics(tmp_path / n / "only" / "metrics.jsonl")[0]["loss"] for n in ("plain", "compiled"))
    assert a == pytest.approx(b, rel=1e-4)


def test_what_does_not_fit_is_done_in_halves_with_the_same_gradient():
    device, count = torch.device(DEVICE), 256
    model, _ = open_artifact("posttrain/tiny-sd3", device)
    model.transformer.requires_grad_(True)
    conditions = Conditions(model.encode_prompts(["", "a red circle"]))
    shape = model.latent_shape(64, 64)

    def gradient(chunk):
        policy = Policy(model, micro_batch=chunk)
        draws = Draws((0, 0, 0), range(count), device)
        ones = torch.ones(count, dtype=torch.int64, device=device)
        batch = Batch(draws.normal("data", shape), ones, conditions)
        with torch.no_grad():
            items = SFT().collect(batch, Tools(policy, draws))
        strategy, settings = alone(policy), Train(steps=1, max_grad_norm=1e9)
        work = functools.partial(update, SFT(), policy, items, strategy, settings)
        halve_until_it_fits(work, policy, lambda: strategy.zero_grad() or True)
        return torch.cat([g.flatten() for g in strategy.optimizer.seen]), policy.micro_batch

    gradient(32)  # libraries take memory of their own at their first use
    torch.cuda.empty_cache()
    rest = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    free, chunk = gradient(count)
    assert chunk == count
    needed = torch.cuda.max_memory_reserved() - rest
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.8 * needed) / total)
        halves, chunk = gradient(count)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert chunk < count
    assert (halves - free).norm() <= 1e-4 * free.norm()


@pytest.mark.parametrize("tune", ["{type: full}", LORA])
@pytest.mark.parametrize("algorithm", ["{type: sft}", SOAR, GRPO, NFT])
def test_no_micro_batch_waits_for_the_device(tmp_path, monkeypatch, algorithm, tune):
    class Watched(Alone):
        """Host and device must not wait for each other from a micro-batch's beginning to the step."""

        def begin_micro_batch(self, *, last):
            super().begin_micro_batch(last=last)
            if len(steps) > 1:  # the first loads libraries, and the second checks that it is on-policy
                torch.cuda.set_sync_debug_mode("error")

        def step(self, max_norm):
            torch.cuda.set_sync_debug_mode("default")
            steps.append(1)
            return super().step(max_norm)

    steps = []
    monkeypatch.setattr(single, "Alone", Watched)
    train = ONE.replace("steps: 1, batch_size: 4, micro_batch: 4", "steps: 4, batch_size: 4, micro_batch: 2")
    try:
        run_quietly(made("only", algorithm, train.replace("{", "{precision: bf16, "), tune=tune), tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 4
