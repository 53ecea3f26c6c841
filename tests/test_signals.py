"""A run that a signal stops keeps what it did, says so, and goes on to the same bits."""

import json
import os
import signal
import subprocess
import time
import types

import pytest
import torch
from forked import ROOT, _main, start
from runs import EVALUATION, HEAD, recipe, run_quietly, stage
from safetensors.torch import load_file

from posttrain.cache.prompts import PromptCache
from posttrain.distributed import launch
from posttrain.engine import checkpoint_folder
from posttrain.engine.tracker import read_metrics
from posttrain.evaluation import evaluate as evaluation
from posttrain.scoring.judge import Judge
from posttrain.stages import fresh, run_folder
from posttrain.stages.hooks import held_out
from posttrain.stages.watch import StageWatch
from posttrain.support import heartbeat
from posttrain.support.stopping import SIGNALS, Stopped, handling

TRAIN = (
    "{steps: 4, batch_size: 4, steps_per_batch: 2, micro_batch: 2, learning_rate: 1e-2, checkpoint_every: 4, "
    "log_every: 1, sample_every: null}"
)
ONLINE = stage(
    "s", "{type: diffusion_nft, group_size: 4, num_steps: 2}", TRAIN, rewards="[jpeg_incompressibility]", monitor="{every: 2, prompts: 4}"
).replace("{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 12}, resolution: 16}")  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An online stage with held-out scores, a cache and an evaluation, in four steps on two batches."""
    cache = f"cache: {{prompts: true, path: {tmp_path_factory.mktemp('cache')}}}\n"
    return recipe(ONLINE, evaluation=EVALUATION, head=HEAD + cache)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The run that no signal stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_quietly(small, folder)
    return folder


def rows(folder):
    """All metrics but those of speed and time."""
    return [
        {k: v for k, v in row.items() if k not in ("time", "images_per_second")}
        for row in read_metrics(folder / "s" / "metrics.jsonl")
    ]


KILL = None
ENDS = [
    ("filling the cache", PromptCache, "fill", 1, ""),
    ("evaluating the base", evaluation, "draw_and_score", 1, ""),
    ("the first reading", held_out, "samples_of", 1, "s ended before its first step"),
    ("the first rollout, after its reading", Judge, "submit", 1, KILL),
    ("the same again", Judge, "submit", 1, KILL),
    ("and once more", Judge, "submit", 1, "s ended before its first step"),
    ("the first of two steps on a batch", StageWatch, "after_step", 1, "s ended after step 2, whose checkpoint is written"),
    ("a reading", held_out, "samples_of", 1, "s ended after step 2, whose checkpoint is written"),
    ("after the reading, which the checkpoint lacks", Judge, "submit", 1, KILL),
    ("a rollout", Judge, "submit", 2, "s ended after step 2, whose checkpoint is written"),
    ("the last step", StageWatch, "after_step", 2, "s ended after step 4, whose checkpoint is written"),
    ("evaluating the stage", evaluation, "draw_and_score", 1, ""),
]  # fmt: skip
"""Where a run is ended, one after the other: in which call of what, and what it says; KILL: nothing any more."""


def ended_in(owner, name, call, says, work, monkeypatch):
    """Do ``work``, with a SIGTERM or a kill in the given call (from 1) of ``owner.name``."""
    calls, original = [], getattr(owner, name)

    def told(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            if says is KILL:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **named)

    with monkeypatch.context() as patch, handling(lambda line: None):
        patch.setattr(owner, name, told)
        with pytest.raises(KeyboardInterrupt if says is KILL else Stopped) as end:
            work()
    assert says in (KILL, str(end.value))


def test_a_run_that_is_ended_anywhere_goes_on_to_the_same_bits(tmp_path, small, whole, monkeypatch):
    folder = tmp_path / "run"
    for place, owner, name, call, says in ENDS:
        ended_in(owner, name, call, says, lambda: run_quietly(small, folder), monkeypatch)
        kept = [int(path.name[5:]) for path in checkpoint_folder.saved(folder / "s" / "checkpoints")][-1:]
        if says and "checkpoint" in says:
            assert kept == [int(says.split()[4].strip(","))], place
        steps = [(row["step"], "loss" in row) for row in rows(folder)]
        assert len(steps) == len(set(steps)), place
        assert not list(folder.rglob("*.part")), place
    run_quietly(small, folder)
    final = "s/final/transformer/diffusion_pytorch_model.safetensors"
    one, other = load_file(whole / final), load_file(folder / final)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows(folder) == rows(whole)
    cards = [json.loads((f / "s/evaluation/eval.json").read_text())["scores"] for f in (whole, folder)]
    assert cards[0] == cards[1]


class Copy:
    """A subprocess.Popen of the command line that is a copy of this process, and so starts at once."""

    def __init__(self, command, env, stdout=None, stderr=None):
        assert command[1:3] == ["-m", "posttrain"]
        out = None if stdout is None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 until it ends
        self.process = start(_main_anew, *command[3:], out=out, err=stderr, environment=env)
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a copy", timeout)


def _main_anew(*arguments):
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # as in a new process
    _main(*arguments)


def _main_of_copies(*arguments):
    launch.subprocess = types.SimpleNamespace(Popen=Copy, DEVNULL=subprocess.DEVNULL)
    _main(*arguments)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_checkpoints_says_how_to_go_on_and_exits_with_75(tmp_path, processes):
    train = "{steps: 5000, batch_size: 4, micro_batch: 4, log_every: 1, sample_every: null, checkpoint_every: 5000}"
    (tmp_path / "small.yaml").write_text(HEAD + "stages:\n" + stage("s", train=train))
    metrics = tmp_path / "runs" / "small" / "s" / "metrics.jsonl"
    more = [] if processes == 1 else ["--nproc", "2"]
    with (tmp_path / "err").open("w+") as err, (tmp_path / "out").open("w+") as out:
        how = {"out": out, "err": err, "environment": {**os.environ, "PYTHONPATH": str(ROOT)}}
        running = start(_main_of_copies, "run", "small.yaml", *more, cwd=tmp_path, **how)
        while running.is_alive() and len(read_metrics(metrics)) < 3:
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGTERM)
        running.join(300)
        err.seek(0)
        said = err.read()
    assert running.exitcode == 75, said
    (saved,) = checkpoint_folder.saved(metrics.parent / "checkpoints")
    last = read_metrics(metrics)[-1]["step"]
    assert saved.name == f"step-{last:08d}"
    kept = f": s ended after step {last}, whose checkpoint is written" if processes == 1 else ""
    command = " ".join(["posttrain run small.yaml", *more])
    assert said.splitlines()[-1] == f"stopped by SIGTERM{kept}. To go on: {command}"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place", ["before", "after"])
def test_the_command_that_goes_on_begins_the_stage_anew_unless_that_is_done(tmp_path, place, processes):
    """A signal in the moment before or after --fresh has removed the stage."""
    (tmp_path / "small.yaml").write_text(HEAD + "stages:\n" + stage("s"))
    (tmp_path / "runs" / "small" / "s").mkdir(parents=True)
    more = ["--fresh", "s"] + ([] if processes == 1 else ["--nproc", "2"])

    def told(*arguments):
        begin_anew = fresh.begin_anew

        def at_the_place(*those):
            if place == "after":
                begin_anew(*those)
            signal.raise_signal(signal.SIGTERM)

        run_folder.begin_anew, heartbeat.begun_anew = at_the_place, False
        _main_of_copies(*arguments)

    with (tmp_path / "err").open("w+") as err, (tmp_path / "out").open("w+") as out:
        how = {"out": out, "err": err, "environment": {**os.environ, "PYTHONPATH": str(ROOT)}}
        running = start(told, "run", "small.yaml", *more, cwd=tmp_path, **how)
        running.join(300)
        err.seek(0)
        said = err.read()
    assert running.exitcode == 75, said
    kept = more if place == "before" else more[2:]
    assert said.splitlines()[-1].endswith(" ".join(["To go on: posttrain run small.yaml", *kept]))
