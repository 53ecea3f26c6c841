"""Runs of small recipes in this process, one of several: python processes.py FILE, a JSON list of runs.

Each run is {"recipe": text, "overrides": [...], "folder": path}.
"""

import json
import sys
from pathlib import Path

from rich.console import Console

from posttrain.chain import run
from posttrain.parallel.world import joined
from posttrain.recipe_file import parse_recipe

sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    console = Console(quiet=True)
    with joined(torch.device("cpu"), group=True):  # one group for all: starting one takes longer than a run
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run(parse_recipe(job["recipe"], "small.yaml", job["overrides"]), Path(job["folder"]), console)
