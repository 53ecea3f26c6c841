"""Runs small recipes in this process, one of several: python processes.py FILE, a JSON list of runs.

Each run is {"recipe": text, "overrides": [...], "folder": path, "stop": step or null}; it ends as a killed one
does after the checkpoint of step ``stop``.
"""

import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from posttrain import checkpoint
from posttrain.chain import run
from posttrain.parallel.world import joined
from posttrain.recipe_file import parse_recipe


class Stopped(BaseException):
    pass


def stopping(save, stop):
    def saved(folder, step, *rest):
        save(folder, step, *rest)
        if step == stop:
            raise Stopped

    return saved


if __name__ == "__main__":
    torch.set_num_threads(1)
    save = checkpoint.save
    with joined(torch.device("cpu"), group=True):  # one group for all: starting one takes longer than a run
        for job in json.loads(Path(sys.argv[1]).read_text()):
            checkpoint.save = stopping(save, job["stop"])
            made = parse_recipe(job["recipe"], "small.yaml", job["overrides"])
            try:
                run(made, Path(job["folder"]), Console(quiet=True))
            except Stopped:
                assert job["stop"]
            except BaseException:
                # the others wait for this one: it must not wait for them at its end
                import os
                import traceback

                traceback.print_exc()
                os._exit(1)
