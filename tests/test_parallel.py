"""Training is the same under every strategy, on one process and on two, and checkpoints move between them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import finished, posttrain
from pipelines import pipeline_folder
from processes import run_jobs
from runs import HEAD, stage
from safetensors.torch import load_file
from stored import whole_state

from posttrain.distributed import launch as launch_module
from posttrain.distributed.environment import MPI, rank_and_world_size
from posttrain.distributed.launch import PORTS, _free_port, run_in_processes
from posttrain.engine.checkpoint_folder import saved
from posttrain.engine.tracker import read_metrics
from posttrain.errors import PosttrainError, RecipeError
from posttrain.recipe.file import parse_recipe
from posttrain.stages.processes import check_processes

TRAIN = (
    "{steps: 20, batch_size: 8, micro_batch: 2, learning_rate: 1e-3, checkpoint_every: 4, keep_checkpoints: 1, "
    "log_every: 1, ema: 0.9, sample_every: null}"
)
TWICE = TRAIN.replace("steps: 20", "steps: 20, steps_per_batch: 2")
DATA, PROMPTS = "{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 12}, resolution: 16}"
FULL, LORA = "{type: full}", "{type: lora, rank: 2, alpha: 4}"
ALGORITHMS = {
    "sft": "{type: sft}",
    "soar": "{type: soar, trajectory_length: 2}",
    "grpo": "{type: flow_grpo, group_size: 4, num_steps: 4, guidance_scale: 2.0}",
    "nft": "{type: diffusion_nft, group_size: 4, num_steps: 4}",
    # held to the base, and not to the stage that it starts from
    "nft-kl": "{type: diffusion_nft, group_size: 4, num_steps: 4, kl_weight: 0.1}",
    "awm": "{type: awm, group_size: 4, num_steps: 4, train_timesteps: 3, beta: 0.1}",
}
STRATEGIES = {
    "ddp": "{strategy: ddp}",
    "fsdp2": "{strategy: fsdp2}",
    **{f"zero-{n}": f"{{strategy: deepspeed, zero_stage: {n}}}" for n in (1, 2, 3)},
}
OFFLOADED = {
    f"{s}-offload": STRATEGIES[s].replace("}", ", offload: true}") for s in ("fsdp2", "zero-2", "zero-3")
}
TOLERANCE = {"sft": 1e-5, "soar": 1e-5, "grpo": 1e-4, "nft": 1e-4, "nft-kl": 1e-4, "awm": 1e-4}
"""Of a weight tensor's distance from one process's, over its norm. Online algorithms look at the difference of
two nearly equal samples, so rounding weighs more in their gradients, and most in a LoRA's B, which begins at 0."""

HALF = {"soar": 5e-2, "nft": 0.5}
"""The same where the forwards are in bf16: a weight that differs in its seventh digit rounds an activation the
other way, by 1 in 256. One process with other micro-batches is as far from itself."""


def text(algorithm, tune):
    if algorithm in ("sft", "soar"):
        return HEAD + "stages:\n" + stage("s", ALGORITHMS[algorithm], TRAIN, tune=tune)
    before, fields = "", {"tune": tune, "rewards": "['brightness:score']"}
    if algorithm == "nft-kl":
        before, fields["reference"] = (
            stage("before", train=TRAIN.replace("steps: 20", "steps: 4"), tune=tune),
            "base",
        )
    made = stage("s", ALGORITHMS[algorithm], TWICE, **fields)
    return HEAD + "stages:\n" + before + made.replace(DATA, PROMPTS)


def launch(jobs, processes, folder):
    """Run ``jobs`` in that many processes.

    They are new ones, as DeepSpeed hangs in a copy of a process. Runs of one process without it take a copy,
    which has imported everything."""
    file = folder / f"jobs-{processes}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(jobs))
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
    }
    if processes == 1 and "deepspeed" not in json.dumps(jobs):
        done = finished(run_jobs, jobs, environment={**shared, "RANK": "0", "LOCAL_RANK": "0"})
        assert done.returncode == 0, done.stderr[-8000:]
        return
    said = (folder / "said.txt").open("w+")
    command = [sys.executable, str(Path(__file__).parent / "processes.py"), str(file)]
    running = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=said, stderr=said
        )
        for r in range(processes)
    ]
    while any(p.poll() is None for p in running):
        time.sleep(0.1)
        if any(p.poll() not in (None, 0) for p in running):
            for p in running:
                p.kill()
    said.seek(0)
    assert [p.wait() for p in running] == [0] * processes, said.read()[-8000:]


def job(algorithm, tune, folder, strategy=None, stop=None, overrides=()):
    made = [*overrides, *([f"parallel={strategy}"] if strategy else [])]
    return {"recipe": text(algorithm, tune), "overrides": made, "folder": str(folder), "stop": stop}


def state(folder):
    return whole_state(saved(folder / "s" / "checkpoints")[-1])


def distance(one, other):
    return max(((one[n] - other[n]).norm() / one[n].norm().clamp(min=1e-12)).item() for n in one)


def assert_same_training(one, other, tolerance, whole=True):
    rows = [read_metrics(f / "s" / "metrics.jsonl") for f in (one, other)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == list(range(1, 21))
    for a, b in zip(*rows, strict=True):
        # the loss of a policy gradient is a difference around 0
        assert abs(a["loss"] - b["loss"]) < 10 * tolerance * max(abs(a["loss"]), 0.01)
        if whole:
            assert a["forward_equivalents"] == b["forward_equivalents"]
        if "reward" in a:
            assert abs(a["reward"] - b["reward"]) < 1e-5
            assert a["advantages"]["counts"] == b["advantages"]["counts"]
    a, b = state(one), state(other)
    assert distance(a["trained"], b["trained"]) < tolerance
    assert distance(a["roles"]["ema"], b["roles"]["ema"]) < tolerance
    moments = [{n: m["exp_avg_sq"] for n, m in s["optimizer"].items()} for s in (a, b)]
    assert distance(*moments) < 10 * tolerance
    assert all(m["step"] == 20 for m in b["optimizer"].values())


def assert_alike(one, other, tolerance):
    rows = [read_metrics(f / "s" / "metrics.jsonl") for f in (one, other)]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["forward_equivalents"] == b["forward_equivalents"]
        if "reward" in a:
            assert a["reward"] == pytest.approx(b["reward"], abs=1e-3)
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=5e-2)
    assert distance(state(one)["trained"], state(other)["trained"]) < tolerance


def assert_in_parts(folder, sharded):
    """Of the weights and each role, two processes hold half each, or all of it."""
    found = [json.loads((folder / "s" / f"held-{r}.json").read_text()) for r in (0, 1)]
    of = found[0]["of"]
    assert {"", "ema"} <= of.keys()
    for role, count in of.items():
        for here in found:
            # an odd length is cut in unequal halves, or filled up
            assert here["held"][role] == pytest.approx(count / 2 if sharded else count, rel=0.1)
        assert sum(here["held"][role] for here in found) >= (1 if sharded else 2) * count


def assert_made_in_parts(folder, step, weights, restoring):
    """Each of two processes copied its half of the weights, EMA, old policy and two moments to save them at
    ``step``. Before, it made ``restoring`` bytes to restore them, for each byte of the ``weights``."""
    for rank in (0, 1):
        made = json.loads((folder / "s" / f"made-{rank}-{step}.json").read_text())
        assert made["saving"] == pytest.approx(5 * weights / 2, rel=0.1)
        assert made["restoring"] == pytest.approx(restoring * weights, rel=0.1)


def assert_published(folder, tune):
    """``final/`` has the EMA of the last checkpoint, to the bit."""
    final, ema = folder / "s" / "final", state(folder)["roles"]["ema"]
    if tune == LORA:
        found = load_file(final / "pytorch_lora_weights.safetensors")
        scale = {n: 2 if ".lora_B." in n else 1 for n in ema}  # alpha / rank
        ema = {f"transformer.{n.replace('.default', '')}": scale[n] * t for n, t in ema.items()}
        assert found.keys() == ema.keys()
    else:
        found = load_file(final / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in ema.items())


def compare(tmp_path, algorithms, strategies, tunes, half=False, micro_batch=2, bf16=False, leave_out=()):
    """Of each algorithm and tuning, one process against two of each strategy; with -s it prints how near.

    ``leave_out`` has pairs of a strategy and an algorithm."""
    overrides = ["model.dtype=bf16"] if half else []
    overrides += ["stages.s.train.precision=bf16"] if bf16 else []
    overrides += [f"stages.s.train.micro_batch={micro_batch}", "stages.s.train.checkpoint_every=20"]
    cases = {f"{a}-{'lora' if t == LORA else 'full'}": (a, t) for a in algorithms for t in tunes}
    ones = [job(a, t, tmp_path / f"one-{name}", overrides=overrides) for name, (a, t) in cases.items()]
    launch(ones, 1, tmp_path)
    blocks = STRATEGIES | OFFLOADED
    jobs = [
        job(a, t, tmp_path / f"{s}-{name}", blocks[s], overrides=overrides)
        for s in strategies
        for name, (a, t) in cases.items()
        if (s, a) not in leave_out
    ]
    launch(jobs, 2, tmp_path)
    for s in strategies:
        for name, (a, tune) in cases.items():
            if (s, a) in leave_out:
                continue
            one, two = (tmp_path / f"{kind}-{name}" for kind in ("one", s))
            print(f"{s} {name}: {distance(state(one)['trained'], state(two)['trained']):.1e}")
            if half or bf16:
                assert_alike(one, two, HALF[a])
            else:
                assert_same_training(one, two, TOLERANCE[a])
            ran = json.loads((two / "s" / "stage.json").read_text())["parallel"]
            assert (ran["processes"], ran["strategy"]) == (2, "deepspeed" if "zero" in s else s.split("-")[0])
            assert_in_parts(two, s.startswith(("fsdp2", "zero-3")))
            assert_published(two, tune)


def test_two_processes_train_as_one(tmp_path):
    """SOAR under DDP, DiffusionNFT under ZeRO-2: the same draws, losses, weights, moments and cost."""
    others = [("ddp", "nft"), ("zero-2", "soar")]  # the matrix has all
    compare(tmp_path, ["soar", "nft"], ["ddp", "zero-2"], [FULL], micro_batch=4, leave_out=others)


@pytest.mark.matrix  # tests/test_ddp.py has two threads in bf16
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_in_bf16_as_one(tmp_path, strategy):
    compare(tmp_path, ["soar"], [strategy], [LORA], bf16=True, micro_batch=4)


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_algorithm_trains_the_same_under_every_strategy(tmp_path, strategy):
    compare(tmp_path, list(ALGORITHMS), [strategy], [FULL, LORA])


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lora_beside_frozen_weights_of_half_precision_trains_the_same(tmp_path, strategy):
    compare(tmp_path, ["soar", "nft"], [strategy], [LORA], half=True)
    found = json.loads((tmp_path / f"{strategy}-nft-lora" / "s" / "held-0.json").read_text())
    assert (found["frozen"], found["trained"]) == (["torch.bfloat16"], ["torch.float32"])


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_training_is_the_same_with_offload_and_goes_on(tmp_path, strategy):
    """On a CPU, where offload moves nothing, but goes through its own code."""
    compare(tmp_path, ["sft", "nft"], [strategy], [FULL, LORA])
    whole, moved, block = tmp_path / "one-nft-full", tmp_path / "moved", OFFLOADED[strategy]
    for stop in (8, None):
        launch([job("nft", FULL, moved, block, stop)], 2, tmp_path)
    assert_same_training(whole, moved, TOLERANCE["nft"])


@pytest.mark.parametrize(
    "kinds",
    [
        [("fsdp2", "full"), ("zero-3", "selective")],
        pytest.param(
            [(name, mode) for name in ("fsdp2", "zero-2", "zero-3") for mode in ("selective", "full")],
            marks=pytest.mark.matrix,
        ),
    ],
    ids=["some", "all"],
)
def test_what_saves_memory_changes_nothing_where_weights_are_in_parts(tmp_path, kinds):
    """In one process of a group; without EMA, so that the strategy's own tensors are written to final/."""
    short = ["stages.0.train.steps=4", "stages.0.train.ema=null"]
    jobs = [job("sft", FULL, tmp_path / "plain", overrides=short)]
    for i, (name, mode) in enumerate(kinds):
        changed = [*short, f"stages.0.train.gradient_checkpointing={mode}", "stages.0.train.micro_batch=auto"]
        jobs.append(job("sft", FULL, tmp_path / str(i), STRATEGIES[name], overrides=changed))
    launch(jobs, 1, tmp_path)
    file = Path("s/final/transformer/diffusion_pytorch_model.safetensors")
    plain, start = load_file(tmp_path / "plain" / file), load_file(pipeline_folder() / Path(*file.parts[2:]))
    assert distance(plain, start) > 1e-3
    for i, kind in enumerate(kinds):
        assert distance(plain, load_file(tmp_path / str(i) / file)) < TOLERANCE["sft"], kind


def test_a_checkpoint_goes_on_under_another_strategy_and_number_of_processes(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    launch([job("nft", FULL, whole), job("nft", FULL, moved, stop=4)], 1, tmp_path)
    legs = [("zero-3", 8), ("fsdp2", 12), ("zero-2", 16)]
    launch([job("nft", FULL, moved, STRATEGIES[s], stop) for s, stop in legs], 2, tmp_path)
    launch([job("nft", FULL, moved)], 1, tmp_path)
    assert_same_training(whole, moved, TOLERANCE["nft"])
    weights = 4 * json.loads((moved / "s" / "held-0.json").read_text())["of"][""]
    # half of the two moments; ZeRO-3 gets a copy of what its own tensors then take over
    assert_made_in_parts(moved, 8, weights, restoring=2)
    assert_made_in_parts(moved, 12, weights, restoring=1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel={strategy: deepspeed, zero_stage: 4}", "zero_stage"),
        ("parallel={strategy: ddp, zero_stage: 2}", "zero_stage"),
        ("parallel={strategy: zero}", "deepspeed"),
        ("parallel={strategy: deepspeed, config: nowhere.json}", "cannot read"),
    ],
)
def test_a_parallel_block_that_cannot_be_is_refused(override, words):
    with pytest.raises(RecipeError, match=words):
        parse_recipe(text("sft", FULL), "small.yaml", [override])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "fp16"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0"),
        ([], "no DeepSpeed configuration"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_is_refused(tmp_path, content, words):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    block = f"{{strategy: deepspeed, config: {tmp_path}/ds.json}}"
    with pytest.raises(RecipeError, match=words):
        parse_recipe(text("sft", FULL), "small.yaml", [f"parallel={block}"])


def test_a_deepspeed_file_is_used_and_the_recipe_decides_what_is_its_own(tmp_path):
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"}
    file = {
        "bf16": {"enabled": "auto"},
        "train_batch_size": 7,
        "zero_optimization": zero,
        "steps_per_print": 9,
    }
    (tmp_path / "ds.json").write_text(json.dumps(file))
    block = f"{{strategy: deepspeed, config: {tmp_path}/ds.json}}"
    made = parse_recipe(text("sft", FULL), "small.yaml", [f"parallel={block}"]).parallel
    found = made.settings(0.5)
    assert made.stage == 3
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "stage3_prefetch_bucket_size" not in found["zero_optimization"]
    assert (found["steps_per_print"], found["gradient_clipping"]) == (9, 0.5)
    assert "train_batch_size" not in found


def test_processes_that_cannot_share_the_work_are_refused():
    with pytest.raises(RecipeError, match="single is one process, not 2"):
        check_processes(parse_recipe(text("sft", FULL), "small.yaml", ["parallel={strategy: single}"]), 2)
    with pytest.raises(RecipeError, match="8 samples do not split over 3 processes; the nearest is 12"):
        check_processes(parse_recipe(text("nft", FULL), "small.yaml", []), 3)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT", "-m"],
    # which without --multi_gpu starts one process where there is no GPU
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "PORT", "-m"],
}  # fmt: skip


# accelerate sets the variables that torchrun does; what it sets besides is tested below in one process
@pytest.mark.parametrize(
    "launcher", ["nproc", "torchrun", pytest.param("accelerate", marks=pytest.mark.matrix)]
)
def test_one_command_starts_two_processes_that_share_a_run(tmp_path, launcher):
    file, run = tmp_path / "small.yaml", tmp_path / "run"
    file.write_text(text("sft", FULL).replace("steps: 20", "steps: 2"))
    words = ["run", str(file), "--output", str(run)]
    if launcher == "nproc":
        done = posttrain(*words, "--nproc", "2", cwd=tmp_path)
    else:
        launching = [str(_free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
        command = [sys.executable, "-m", *launching, "posttrain", *words]
        environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    ran = json.loads((run / "s" / "stage.json").read_text())
    assert (ran["parallel"]["processes"], ran["samples"]) == (2, 10)  # batches of 8 and of 2


def test_the_processes_port_is_free_and_stays_so(monkeypatch):
    """It is opened seconds later: until then the system must give it to nobody else."""
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("utf-8").split()
    assert set(PORTS) < set(range(1024, int(first)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        used = taken.getsockname()[1]
        monkeypatch.setattr(launch_module, "PORTS", [used, *PORTS])
        assert all(_free_port() in PORTS for _ in range(9))
        monkeypatch.setattr(launch_module, "PORTS", [used])
        with pytest.raises(
            PosttrainError, match=f"none of the ports {used} to {used} is free: set MASTER_PORT"
        ):
            _free_port()


@pytest.fixture
def nowhere(monkeypatch):
    """An environment that no launcher has set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_task_of_srun_knows_its_place(nowhere):
    slurm = {"PROCID": 5, "STEP_NUM_TASKS": 8, "LOCALID": 1, "STEP_NUM_NODES": 2, "JOB_ID": 41234}
    for name, value in slurm.items():
        nowhere.setenv(f"SLURM_{name}", str(value))
    nowhere.setenv("SLURM_STEP_NODELIST", "node3,node4")
    assert rank_and_world_size() == (5, 8)
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["1", "4", "node3", "21234"]


@pytest.mark.parametrize("words", MPI)
def test_a_process_of_mpirun_knows_its_place(nowhere, words):
    for name, value in zip(words, (5, 8, 1, 4), strict=True):
        nowhere.setenv(name, str(value))
    assert rank_and_world_size() == (5, 8)
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("1", "4")


def test_one_process_where_accelerate_meant_two_is_refused(nowhere):
    nowhere.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert rank_and_world_size() == (0, 1)  # accelerate launch --num_processes 1
    nowhere.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(PosttrainError, match="started this one alone"):
        rank_and_world_size()


def test_processes_of_a_launcher_start_no_others(nowhere):
    nowhere.setenv("RANK", "1")
    nowhere.setenv("WORLD_SIZE", "2")
    with pytest.raises(PosttrainError, match="process 1 of 2 that a launcher started: leave"):
        run_in_processes(2)


def test_a_process_without_the_others_address_is_refused(monkeypatch):
    from posttrain.distributed.world import joined

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(PosttrainError, match="process 1 of 2, and MASTER_ADDR"), joined(torch.device("cpu")):
        pass
