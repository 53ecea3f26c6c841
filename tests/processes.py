"""Runs small recipes in this process, one of several that share them.

Each run is {"recipe": text, "overrides": [...], "folder": path, "stop": step or null}; it ends as a killed one
does after the checkpoint of step ``stop``. Beside a stage's checkpoints each process says what it holds, and how
many bytes it made of tensors to save and to restore them.
"""

import faulthandler
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from rich.console import Console
from stored import Made

from posttrain.distributed.leaving import leave
from posttrain.distributed.world import joined
from posttrain.engine.checkpoint_folder import CheckpointFolder
from posttrain.recipe.file import parse_recipe
from posttrain.stages.chain import run


class Stopped(BaseException):
    pass


def held(policy):
    """Of the weights and each role: how many numbers are held here, of how many; and the frozen weights' types."""
    layout, all_of = policy.layout, policy.parameters
    weights = {"": {n: layout.local(p) for n, p in all_of.items()}, **policy.roles}
    return {
        "held": {role: sum(t.numel() for t in tensors.values()) for role, tensors in weights.items()},
        "of": {
            role: sum(layout.shape(all_of[n]).numel() for n in tensors) for role, tensors in weights.items()
        },
        "frozen": sorted({str(p.dtype) for p in all_of.values() if not p.requires_grad}),
        "trained": sorted({str(p.dtype) for p in policy.trained.values()}),
    }


def stopping(save, stop, rank, made):
    def saved(self, step, *rest):
        with Made() as saving:
            save(self, step, *rest)
        (self.folder.parent / f"held-{rank}.json").write_text(json.dumps(held(self.policy)))
        bytes_made = {"saving": saving.bytes, "restoring": made.bytes}
        file = self.folder.parent / f"made-{rank}-{step}.json"
        if not file.exists():  # where a run goes on, it finds the checkpoint of this step, and makes nothing
            file.write_text(json.dumps(bytes_made))
        if step == stop:
            raise Stopped

    return saved


def counted(restore, made):
    def restored(self, *rest):
        with made:
            return restore(self, *rest)

    return restored


def no_compiler():
    """Let DeepSpeed use gloo between CPUs, and not an operator that it would compile for a minute."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def run_jobs(jobs):
    """Run each of ``jobs``, in this process as one of those of its environment."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # or what went wrong is not in the last lines
    if any("deepspeed" in o and "offload" not in o for job in jobs for o in job["overrides"]):
        no_compiler()
    save, linear, load = CheckpointFolder.save, torch.nn.functional.linear, CheckpointFolder.restore
    # one group for all: starting one takes longer than a run
    with joined(torch.device("cpu"), group=True) as world:
        for job in jobs:
            made_by_restore = Made()
            CheckpointFolder.save = stopping(save, job["stop"], world.rank, made_by_restore)
            CheckpointFolder.restore = counted(load, made_by_restore)
            made = parse_recipe(job["recipe"], "small.yaml", job["overrides"])
            try:
                run(made, Path(job["folder"]), Console(quiet=True))
                assert torch.nn.functional.linear is linear, "ZeRO-3's is left for the models after it"
            except Stopped:
                assert job["stop"]
                torch.nn.functional.linear = linear
            except BaseException:
                # the others wait for this one: it must not wait for them at its end
                traceback.print_exc()
                os._exit(1)


if __name__ == "__main__":
    faulthandler.enable()
    run_jobs(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    leave(0)
