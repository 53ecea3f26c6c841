"""Kills runs at random places until they are finished, and compares each with a run that nothing stopped.

    python benchmarks/torture.py --kills 300 --seed 0
    python benchmarks/torture.py --kills 30 --strategy fsdp2       # two processes

A run is a chain of SFT, SOAR, DiffusionNFT and Flow-GRPO on the shipped tiny model, with caches, EMA, image
grids and an evaluation of every stage. With ``--strategy`` it is SFT and DiffusionNFT in two processes. Half
of the kills come at a random file operation of a process in the run's folders (a file opened for writing,
renamed or removed, a folder made or removed), half after a random time. Of two processes a kill meets the one
or the other, their launcher, or all; then none of them may be left. A finished run must have the weights,
records, scores and files of the undisturbed one, bit for bit; time and speed aside. Prints a table, and ends
with 1 if a run differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torture_starts import ALL, LAUNCHER, Order, noted, started

from posttrain.engine.tracker import read_metrics
from posttrain.recipe.file import parse_recipe

TRAIN = "batch_size: 4, micro_batch: 4, learning_rate: 1e-3, log_every: 1"
PROMPTS = "{prompts: {type: shapes, count: 8}, resolution: 32}"
HEAD = """
name: torture
device: cpu
tracker: none
model: {type: sd3, path: posttrain/tiny-sd3, max_sequence_length: 16}
cache: {prompts: true, latents: sampled, path: CACHE}
stages:
"""
SFT = f"""
  - name: sft
    algorithm: {{type: sft}}
    data: &images {{type: shapes, images: 12, seed: 1}}
    train: {{steps: 3, {TRAIN}, checkpoint_every: 1, ema: 0.9, sample_every: 2}}
"""
SOAR = f"""
  - name: soar
    algorithm: {{type: soar, trajectory_length: 2}}
    data: *images
    train: {{steps: 2, {TRAIN}, checkpoint_every: 1, sample_every: null}}
"""
NFT = f"""
  - name: nft
    tune: {{type: lora, rank: 4}}
    algorithm: {{type: diffusion_nft, group_size: 4, num_steps: 2}}
    data: {PROMPTS}
    rewards: jpeg_incompressibility
    train: {{steps: 2, {TRAIN}, checkpoint_every: 1, sample_every: null}}
"""
GRPO = f"""
  - name: grpo
    tune: {{type: lora, rank: 4}}
    algorithm: {{type: flow_grpo, group_size: 4, num_steps: 3, guidance_scale: 1.0, beta: 0.0}}
    data: {PROMPTS}
    rewards: jpeg_incompressibility
    train: {{steps: 4, steps_per_batch: 2, {TRAIN}, checkpoint_every: 2, sample_every: null}}
    monitor: {{every: 2, prompts: 2}}
"""
EVALUATION = """
evaluation:
  prompts: {type: shapes, count: 4}
  rewards: shapes
  resolution: 32
  steps: 2
  guidance: 1
  grid: 2
"""
VICTIMS = ["0", "1", LAUNCHER, ALL]
EARLY = 0.3
"""A start is killed within this share of an undisturbed run, unless it finishes before."""
UNEQUAL = {"time", "images_per_second"}
"""Figures of a metrics row that differ between equal runs."""


def content(folder: Path) -> dict[str, Any]:
    """What a finished run must have in common with any other of the same recipe."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or file.name.endswith(".lock") or file.name == ".lock":
            continue
        if file.name == "metrics.jsonl":
            rows = [{k: v for k, v in r.items() if k not in UNEQUAL} for r in read_metrics(file)]
            found[name] = json.dumps(rows)
        elif file.name == "records.jsonl" or file.suffix in (".safetensors", ".png"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "eval.json":
            found[name] = json.dumps(json.loads(file.read_text("utf-8"))["scores"])
        else:
            found[name] = "is there"
    return found


def kind(place: str) -> str:
    """A place without numbers and random names."""
    event, _, name = place.partition(" ")
    if not name:
        return place
    parts = [part.strip(".").split(".")[0].rstrip("0123456789-") for part in Path(name).parts if part != "/"]
    return f"{event} {'/'.join(parts[:4])}"


def recipe_of(folder: Path, strategy: str | None) -> Path:
    """The recipe of the run in ``folder``, in one process or two."""
    stages = [SFT, SOAR, NFT, GRPO] if strategy is None else [SFT, NFT.replace("*images", "images")]
    parallel = "" if strategy is None else f"parallel: {{strategy: {strategy}}}\n"
    text = "".join([HEAD.replace("CACHE", str(folder / "cache")), *stages, EVALUATION, parallel])
    file = noted(folder) / "torture.yaml"
    file.write_text(text, "utf-8")
    return file


class Torture:
    """Runs that are killed and taken up again, and what became of them."""

    def __init__(self, root: Path, strategy: str | None, seed: int, keep: bool) -> None:
        self.root, self.strategy, self.dice, self.keep = root, strategy, random.Random(seed), keep
        self.count = 1 if strategy is None else 2
        self.kills = self.runs = 0
        self.places, self.victims, self.differing = Counter[str](), Counter[str](), list[str]()
        whole, start = root / "whole", time.monotonic()
        whole.mkdir(parents=True)
        started(whole, recipe_of(whole, strategy), self.count, Order(LAUNCHER))
        self.seconds, self.expected = time.monotonic() - start, content(whole / "run")
        counts = [noted(whole) / f"{rank}.count" for rank in range(self.count)]
        self.operations = [int(file.read_text("utf-8")) for file in counts]
        print(f"undisturbed: {self.seconds:.1f} s, {self.operations} file operations", flush=True)

    def one(self) -> None:
        """Start a run until it is finished, and compare it."""
        folder = self.root / f"run-{self.runs}"
        folder.mkdir()
        recipe = recipe_of(folder, self.strategy)
        while True:
            order, seconds = self._order()
            if (place := started(folder, recipe, self.count, order, seconds)) is None:
                break
            self.kills += 1
            self.places[kind(place)] += 1
            self.victims[order.victim] += 1
        self.runs += 1
        got, expected = content(folder / "run"), self.expected
        if wrong := sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n)):
            self.differing.append(f"{folder.name}: {', '.join(wrong[:6])}")
            print(self.differing[-1], flush=True)
        elif not self.keep:
            shutil.rmtree(folder)
        print(f"{self.kills} kills, {self.runs} runs finished", flush=True)

    def _order(self) -> tuple[Order, float | None]:
        """Who is killed next, and at which file operation or after how many seconds."""
        early = EARLY * self.dice.random()
        victim = LAUNCHER if self.count == 1 else self.dice.choice(VICTIMS)
        if self.dice.random() < 0.5:
            # the operations of both are as likely: those of the main process are most of all
            rank = self.dice.randrange(self.count)
            return Order(victim, rank, 1 + int(self.operations[rank] * early)), None
        return Order(victim), self.seconds * early


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], help="in two processes")
    parser.add_argument("--folder", type=Path, help="for the runs, which stay; by default a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be copied
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary) / "runs"
        _import_all(root / "whole")
        it = Torture(root, options.strategy, options.seed, options.folder is not None)
        while it.kills < options.kills:
            it.one()
    by_time = it.places.pop("time", 0)
    print(f"\n| {it.kills} kills, seed {options.seed} | |\n| --- | --- |")
    if options.strategy:
        of_each = ", ".join(str(it.victims[victim]) for victim in VICTIMS)
        print(f"| of process 0, of process 1, of the launcher, of all | {of_each} |")
    print(f"| at a random time | {by_time} |")
    print(f"| at a file operation, of {len(it.places)} kinds | {it.kills - by_time} |")
    print(f"| runs that were finished | {it.runs} |")
    print(f"| of them equal to the undisturbed run | {it.runs - len(it.differing)} |")
    print(f"| minutes | {(time.monotonic() - began) / 60:.0f} |")
    raise SystemExit(1 if it.differing else 0)


def _import_all(folder: Path) -> None:
    """Import what a run imports, so that its copies need not."""
    for module in ("posttrain.cli.app", "posttrain.stages.chain"):
        importlib.import_module(module)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = parse_recipe(recipe_of(folder, None).read_text("utf-8"), "torture.yaml")
    made.model.build(folder.parent / "model", torch.device("cpu")).load(torch.device("cpu"), "fp32")


if __name__ == "__main__":
    main()
