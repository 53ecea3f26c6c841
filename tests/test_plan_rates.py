"""A plan counts time from the measured row that is nearest, in the units in which a plan counts work."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.planning.budget import Budget
from posttrain.planning.counts import Counts
from posttrain.planning.gpus import Device, gpu
from posttrain.planning.needs import stage_needs
from posttrain.planning.rates import Rates, Row, Wanted, shipped_rates
from posttrain.planning.store import store_of
from posttrain.planning.work import Work
from posttrain.recipe.file import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Counts that a plan keeps go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


ABOUT = {
    "device": "H100 80GB",
    "product_tflops": 100,
    "date": "d",
    "torch": "t",
    "commit": "c",
    "command": "x",
}
ENCODE = Row("encode", precision="tf32", samples_per_second=10, image_tflop=1, **ABOUT)
STEP = Row(
    "step",
    precision="bf16",
    samples_per_second=4,
    image_tflop=1,
    algorithm="soar",
    tune="full",
    checkpointing="full",
    micro_batch=4,
    forward_tflop=2,
    rollout=2,
    training=1,
    images="encoded",
    **ABOUT,
)
WANTED = Wanted("training", "H100 80GB", "bf16", "soar", "full", checkpointing="full", micro_batch=4)


def equivalents(row):
    """Forwards of one sample as benchmarks count them: what is computed again is no work."""
    return row.rollout + row.frozen + 3 * row.training


def needs(works, **mode):
    mode = {
        "algorithm": "soar",
        "tune": "full",
        "compile": False,
        "checkpointing": "full",
        "micro_batch": 4,
    } | mode
    kinds = dict.fromkeys(("training", "rollout", "text", "encode", "decode"), Work())
    return SimpleNamespace(works=kinds | works, mode=mode, evaluates=False)


def test_a_rate_counts_what_is_computed_again_and_not_the_autoencoder():
    rates = Rates([ENCODE, STEP])
    # a sample takes 0.25 s, of which 0.1 s are its encoding; 2 TFLOP x (2 rollout + 3 + 1 computed again)
    assert rates.flops_per_second(STEP) == pytest.approx(2e12 * 6 / 0.15)
    off = replace(STEP, checkpointing="off")
    assert rates.flops_per_second(off) == pytest.approx(2e12 * 5 / 0.15)
    assert rates.flops_per_second(ENCODE) == 10e12
    decoded = replace(STEP, images="decoded")  # whose rate nobody measured
    assert rates.flops_per_second(decoded) == pytest.approx(2e12 * 6 / 0.25)


def test_a_plan_of_what_was_measured_takes_the_measured_time():
    budget = Budget(gpu("h100"), 1, rates=Rates([ENCODE, STEP]))
    sample = {"training": Work(low=8e12), "rollout": Work(low=4e12), "encode": Work(full=1e12)}
    assert budget.seconds(needs(sample)) == pytest.approx(1 / 4)
    assert Budget(gpu("h100"), 8, rates=Rates([ENCODE, STEP])).seconds(needs(sample)) == pytest.approx(1 / 32)


def test_a_given_mfu_overrides_every_row():
    budget = Budget(gpu("h100"), 8, 0.5, "given", tf32=True)
    assert budget.seconds(needs({"training": Work(low=989e12)})) == pytest.approx(1 / 8 / 0.5)
    assert budget.seconds(needs({"encode": Work(full=989e12)})) == pytest.approx(2 / 8 / 0.5)


def test_an_evaluation_never_multiplies_in_tf32():
    work = needs({"decode": Work(full=67e12)})
    work.evaluates = True
    assert Budget(gpu("h100"), 1, 1.0).seconds(work) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"compile": True}, False),
        ({"precision": "fp32"}, False),
        ({"kind": "text"}, False),
        ({"kind": "rollout"}, True),
        ({"forward": 0.24e12}, False),
        ({"forward": 0.26e12}, True),
        ({"device": "A100 80GB", "tune": "lora", "checkpointing": "off", "algorithm": "sft"}, True),
    ],
)
def test_a_row_fits_work_of_its_kind_precision_size_and_mode(changes, fits):
    assert (Rates([STEP]).nearest(replace(WANTED, **changes)) is STEP) == fits


def test_rows_are_compared_in_the_documented_order():
    # each row is the farthest in one respect, and the nearest in all that count less
    fields = [
        {"device": "A100 80GB"},
        {"micro_batch": 16},
        {"tune": "lora", "micro_batch": 8},
        {"checkpointing": "off", "micro_batch": 8},
        {"algorithm": "sft", "micro_batch": 8},
        {"micro_batch": 8},
        {"micro_batch": 6},
        {"micro_batch": 5},
    ]
    rows = [replace(STEP, **changes) for changes in fields]
    while rows:
        best = Rates(rows).nearest(WANTED)
        assert best is rows[-1]
        rows.pop()
    first, second = replace(STEP, date="1"), replace(STEP, date="2")
    assert Rates([first, second]).nearest(WANTED) is second


def test_a_compiled_rate_is_scaled_by_the_peaks_and_an_eager_one_is_the_hosts():
    compiled = replace(STEP, compile=True)
    rates, l4 = Rates([ENCODE, compiled, STEP]), gpu("L4")
    flops = rates.flops_per_second(STEP)  # 80 TFLOP/s
    work = needs({}, compile=True)
    pace = Budget(l4, 1, rates=rates).pace(work, "training", "bf16")
    assert pace.flops == pytest.approx(flops * 121 / 989)
    eager = Budget(l4, 1, rates=rates).pace(needs({}), "training", "bf16")
    assert (eager.flops, eager.source) == (pytest.approx(0.4 * 121e12), "assumed")
    a100 = Budget(gpu("A100 80GB"), 1, rates=rates).pace(needs({}), "training", "bf16")
    assert (a100.flops, a100.row) == (flops, STEP)
    # a peak that was measured is compared with the measured product of the row's session
    here = Device("card", 1e9, 50e12, 25e12, 1e12, "measured")
    assert Budget(here, 1, rates=rates).pace(work, "training", "bf16").flops == pytest.approx(flops / 2)


def test_a_gpu_without_bf16_has_no_row():
    t4 = gpu("t4")
    assert (t4.peak("bf16"), t4.peak("tf32")) == (8.1e12, 8.1e12)
    pace = Budget(t4, 1, rates=Rates([STEP])).pace(needs({}), "training", "bf16")
    assert (pace.row, pace.flops) == (None, pytest.approx(0.4 * 8.1e12))


def test_the_shipped_rows_have_the_documented_mfu_and_the_counted_flops():
    rows = shipped_rates().rows
    assert len(rows) >= 22
    for row in rows:
        if row.mfu is not None:
            mfu = equivalents(row) * row.forward_tflop * row.samples_per_second / row.product_tflops
            assert mfu == pytest.approx(row.mfu, abs=0.001), row
        model = load_recipe("sd35m-soar", [f"model.max_sequence_length={row.tokens}"], checks=False).model
        with store_of(model) as store:
            counts = Counts(model, cuda=True, store=store)
            side = row.resolution, row.resolution
            kind = row.kind if row.kind in ("encode", "decode") else row.images.removesuffix("d")
            assert counts.flops(kind, side) / 1e12 == pytest.approx(row.image_tflop, rel=1e-5)
            if row.kind not in ("encode", "decode"):
                assert counts.flops("forward", side) / 1e12 == pytest.approx(row.forward_tflop, rel=1e-5)


GRPO = "algorithm={type: flow_grpo, group_size: 24, num_steps: 10, sde_window_size: 3, guidance_scale: 1.0, beta: 0}"
RECIPES = {
    "soar": ("sd35m-soar", []),
    "sft": ("sd35m-sft", []),
    "flow_grpo": (
        "sd35m-grpo-fast",
        [f"stages.0.{GRPO}", "stages.0.data.resolution=384", "stages.0.train.batch_size=768"],
    ),
    "diffusion_nft": ("sd35m-nft-pickscore", []),
}


def planned_as(row):
    """A stage as a row was measured, and the samples/s of its plan, without text, from ``rates``."""
    name, settings = RECIPES[row.algorithm]
    train = "stages.0.train"
    recipe = load_recipe(
        "sd35m-soar-lora" if (row.algorithm, row.tune) == ("soar", "lora") else name,
        [
            *settings,
            f"{train}.compile={str(row.compile).lower()}",
            f"{train}.gradient_checkpointing={row.checkpointing}",
            f"{train}.micro_batch={row.micro_batch}",
            f"model.max_sequence_length={row.tokens}",
            f"{train}.sample_every=null",
            "stages.0.monitor=null",
        ],
        checks=False,
    )
    stage = recipe.stages[0]
    with store_of(recipe.model) as store:
        found = stage_needs(recipe, stage, Counts(recipe.model, cuda=True, store=store))
    samples = stage.train.steps * stage.train.batch_size / stage.train.steps_per_batch

    def speed(rates):
        seconds = Budget(gpu("h100"), 1, rates=rates).seconds_by_kind(found)
        return samples / (sum(seconds.values()) - seconds["text"])

    return speed


STEPS = [row for row in shipped_rates().rows if row.kind == "step"]
NEWEST = {
    (row.algorithm, row.tune, row.compile, row.checkpointing, row.micro_batch): row
    for row in STEPS
    if not (row.compile and row.checkpointing == "selective")  # recipes refuse it now
}


@pytest.mark.parametrize("row", NEWEST.values(), ids=lambda row: str(row).partition(" samples")[0])
def test_a_plan_is_within_15_percent_of_what_was_measured(row):
    speed = planned_as(row)
    other = speed(Rates([r for r in shipped_rates().rows if r is not row]))
    print(f"\n| {row} | {speed(shipped_rates()):.2f} | {row.samples_per_second / other:.2f} |")
    assert speed(shipped_rates()) == pytest.approx(row.samples_per_second, rel=0.15)


def test_a_session_becomes_rows(tmp_path, monkeypatch, capsys):
    lines = [
        {"source": "table", "entry": "device", "name": "NVIDIA H100 80GB HBM3", "torch": "2.11", "matmul_tflops": 700},
        {"source": "table", "entry": "soar compiled off", "micro_batch": 7, "samples_per_second": 5.5, "mfu": 0.44},
        {"source": "table", "entry": "grpo compiled", "micro_batch": 24, "samples_per_second": 12, "slice": 48, "of": 768},
        {"source": "table", "entry": "soar compiled 0.5", "micro_batch": 28, "samples_per_second": 5, "mfu": 0.4},
        {"source": "table", "entry": "nft compiled", "error": "out of memory"},
        {"source": "table", "entry": "vae", "encode": {"samples_per_second": 60}, "decode": {"samples_per_second": 40}},
        {"source": "lab", "entry": "bf16 rows 14", "rows": 14, "samples_per_second": 55.0},
    ]  # fmt: skip
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kept = tmp_path / "rates.json"
    kept.write_text((ROOT / "posttrain" / "planning" / "rates.json").read_text())
    arguments = [str(tmp_path / "gpu.jsonl"), "--commit", "abc", "--date", "2027-01-01", "--rates", str(kept)]
    monkeypatch.setattr(sys, "argv", ["add_rates.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / "add_rates.py"), run_name="__main__")
    assert "5 rows of H100 80GB added" in capsys.readouterr().out
    from posttrain.planning.rates import read_rows

    rows = read_rows(kept)
    assert rows[: len(shipped_rates().rows)] == shipped_rates().rows
    soar, grpo, share, encode, decode = rows[-5:]
    assert (soar.algorithm, soar.tune, soar.compile, soar.commit) == ("soar", "full", True, "abc")
    # 23 forward-equivalents of 2.44 TFLOP
    assert equivalents(soar) * soar.forward_tflop * 5.5 / 700 == pytest.approx(0.44, abs=0.002)
    assert (grpo.resolution, grpo.image_tflop, grpo.note) == (384, 1.40622, "48 of 768 samples")
    assert (encode.samples_per_second, decode.samples_per_second) == (60, 40)
    wanted = replace(WANTED, compile=True, checkpointing="off", micro_batch=7)
    assert Rates(rows).nearest(wanted) == soar
    assert Rates(rows).nearest(replace(wanted, checkpointing="0.5", micro_batch=28)) == share


def test_every_step_that_the_table_measures_becomes_a_row(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import add_rates
    import gpu_table

    names = set()
    for kind in (gpu_table.WithLora, gpu_table.Whole):
        made = object.__new__(kind)
        made.step = None
        names |= {name for name, _, _ in made.entries()}
    others = {"vae", "straightforward soar", "8-bit soar compiled 0.2"} | {
        name for name in names if name.endswith("profile")
    }
    assert names - others == add_rates.ENTRIES.keys()


@pytest.mark.parametrize("way", ["off", "selective", "full"])
def test_a_benchmark_checkpoints_in_the_ways_of_the_engine(monkeypatch, way):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _bench

    monkeypatch.setattr(sys, "argv", ["soar_step.py", "--model", "sd35m", "--checkpointing", way])
    found = _bench.arguments("", 4, points=6)
    assert (found.checkpointing, found.resolution, found.points) == (way, 512, 6)


def test_a_file_without_figures_adds_none(tmp_path, monkeypatch):
    (tmp_path / "gpu.jsonl").write_text('{"source": "table", "entry": "soar compiled off", "error": "x"}')
    monkeypatch.setattr(sys, "argv", ["add_rates.py", str(tmp_path / "gpu.jsonl"), "--commit", "abc"])
    with pytest.raises(SystemExit, match="no figures"):
        runpy.run_path(str(ROOT / "benchmarks" / "add_rates.py"), run_name="__main__")
