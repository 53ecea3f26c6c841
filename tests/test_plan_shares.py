"""A plan divides weights, gradients and moments between devices as each strategy does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.parallel.shares import Shares
from posttrain.planning.memory import Phase, memory
from posttrain.planning.sizes import Sizes, moment_bytes
from posttrain.recipe.file import load_recipe

ROOT = Path(__file__).parent.parent

SIZES = Sizes(
    trained=100, frozen=80, moments=800, roles=400, rewards=3, encoders={"prompts": 5, "images": 2},
    gathered=30, gathered_gradients=20,
)  # fmt: skip


IDLE = frozenset({"prompts", "images"})


PHASES = {"training": Phase(50.0, 5.0, gradients=True, encoders=IDLE, forward=True, backward=True)}


def shared(block, devices=4):
    spread = load_recipe("sd35m-soar", [f"parallel={block}"], checks=False).parallel
    found = memory(SIZES, PHASES, replace(spread.shares(devices), buffer=0))
    return found.parts, found.host


def test_a_strategy_divides_what_it_says():
    whole = {
        "weights": 490, "gradients": 400, "optimizer": 800, "roles": 400, "activations": 50, "caches": 5,
    }  # fmt: skip
    assert shared("{strategy: single}", 1) == shared("{strategy: ddp}") == (whole, 0)
    zero = [shared(f"{{strategy: deepspeed, zero_stage: {stage}}}")[0] for stage in (1, 2, 3)]
    assert [m["optimizer"] for m in zero] == [200, 200, 200]
    assert [m["gradients"] for m in zero] == [400, 100, 100]
    assert [m["roles"] for m in zero] == [400, 400, 100]
    assert [m["weights"] for m in zero] == [590, 590, 230]
    fsdp, host = shared("{strategy: fsdp2}")
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"], fsdp["caches"]) == (130, 100, 200, 55)
    assert host == 0


def test_offloading_moves_to_the_host_what_it_says():
    fsdp, host = shared("{strategy: fsdp2, offload: true}")
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"], fsdp["roles"]) == (10, 0, 0, 0)
    assert host == 120 + 100 + 200 + 100
    zero, host = shared("{strategy: deepspeed, zero_stage: 2, offload: true}")
    assert (zero["weights"], zero["gradients"], zero["optimizer"], zero["roles"]) == (490, 0, 0, 400)
    assert host == 3 * 100 + 100 + 200
    zero, host = shared("{strategy: deepspeed, zero_stage: 3, offload: true}")
    assert (zero["weights"], zero["gradients"], zero["optimizer"], zero["roles"]) == (10, 0, 0, 0)
    assert host == 120 + 2 * 100 + 100 + 200 + 100
    # a device without memory of its own has it all
    spread = load_recipe("sd35m-soar", ["parallel={strategy: fsdp2, offload: true}"], checks=False).parallel
    alone = memory(SIZES, PHASES, spread.shares(4), separate=False)
    assert (alone.optimizer, alone.host) == (200, 0)


def test_a_deepspeed_file_says_what_is_spread_and_offloaded(tmp_path):
    file = tmp_path / "zero.json"
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    block = f"parallel={{strategy: deepspeed, config: {file}}}"
    spread = load_recipe("sd35m-soar", [block], checks=False).parallel
    shares = spread.shares(2)
    assert shares.buffer == 4000
    assert (shares.weights.fraction, shares.gradients.fraction, shares.moments.fraction) == (1, 1, 0.5)
    assert shares.moments.on_host
    assert spread.label(2) == "DeepSpeed ZeRO-1, offloaded"


@pytest.mark.matrix
@pytest.mark.parametrize(
    "block",
    [
        "{strategy: ddp}",
        "{strategy: fsdp2}",
        *(f"{{strategy: deepspeed, zero_stage: {stage}}}" for stage in (1, 2, 3)),
        *(f"{{strategy: deepspeed, zero_stage: {stage}, offload: true}}" for stage in (2, 3)),
    ],
)
def test_two_processes_hold_what_their_shares_say(block):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run, str(Path(__file__).parent / "held_memory.py"), block],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("held")), None)
    assert line is not None, done.stderr
    held, planned = map(float, line.split()[1:])
    assert planned == pytest.approx(held, rel=0.03)


def test_ddp_keeps_the_room_of_gradients_between_steps():
    phases = {"text": Phase(500.0)}
    spread = {n: load_recipe("sd35m-soar", checks=False).parallel.shares(n) for n in (1, 2)}
    assert [memory(SIZES, phases, spread[n]).gradients for n in (1, 2)] == [0, 400]


def test_the_phase_that_needs_most_counts():
    first = {"training": Phase(500.0), "optimizer": Phase(0.0, gradients=True)}
    assert memory(SIZES, first, Shares()).phase == "training"
    assert memory(SIZES, first, Shares()).gradients == 0
    assert memory(SIZES, {**first, "training": Phase(300.0)}, Shares()).phase == "optimizer"


def test_moments_in_8_bits_take_a_quarter_but_for_small_tensors():
    small, large = 4095, 4096
    assert moment_bytes("adamw", [small, large]) == 8 * 8191
    assert moment_bytes("adamw8bit", [small]) == 8 * 4095
    assert moment_bytes("adamw8bit", [large]) == 2 * 4096 + 8 * 16
