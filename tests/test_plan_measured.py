"""The memory that a plan counts is what a run takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from plans import CASES, need, planned

ROOT = Path(__file__).parent.parent

OFTEN = [("sft", "{type: full}"), ("sft", "{type: lora, rank: 8}"), ("flow_grpo", "{type: full}")]


MEASURED = [
    *(
        pytest.param(name, tune, "", marks=[] if (name, tune) in OFTEN else pytest.mark.matrix)
        for name in CASES
        for tune in ("{type: full}", "{type: lora, rank: 8}")
    ),
    ("sft", "{type: full}", "gradient_checkpointing: selective"),
    ("sft", "{type: full}", "gradient_checkpointing: full"),
    ("sft", "{type: full}", "optimizer: adamw8bit"),
]


@pytest.fixture(scope="module")
def measuring():
    """The running program of measured_memory.py."""
    malloc = {"MMAP_THRESHOLD_": "65536", "TRIM_THRESHOLD_": "0", "ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{f"MALLOC_{n}": v for n, v in malloc.items()}}
    command = [sys.executable, str(Path(__file__).parent / "measured_memory.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as program:
        yield program
        program.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is reset by Linux only")
@pytest.mark.parametrize(("name", "tune", "train"), MEASURED)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(tmp_path, measuring, name, tune, train):
    from posttrain.recipe.file import dump_recipe

    recipe = planned(name, tune, f"micro_batch: 32, {train}")
    estimate = need(recipe).memory.total
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    measuring.stdin.write(f"{tmp_path / 'r.yaml'}\n")
    measuring.stdin.flush()
    measured = float(measuring.stdout.readline())
    figures = f"{estimate / 1e6:.0f} | {measured / 1e6:.0f} | {estimate / measured:.2f}"
    print(f"\n| {name} | {tune} {train} | {figures} |")
    assert estimate == pytest.approx(measured, rel=0.15)
