"""Runs a shipped recipe by ``posttrain run``, as it ships, and measures what it chose and how fast it is.

    OUT=runs/gpu python benchmarks/as_shipped.py sd35m-soar --steps 4 --seconds 240
    python benchmarks/as_shipped.py sd35m-soar --tiny

The model has Stable Diffusion 3.5 Medium's true shape, random weights and small text encoders. Images and
prompts are made up, and a reward without weights takes the place of the recipe's. The run is ended after
``--steps`` optimizer steps beyond the first, which compiles. ``--set`` changes the recipe as that of
``posttrain run`` does. What the run printed and tried goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _model import model_of

from posttrain.engine.tracker import read_metrics
from posttrain.recipe.file import load_recipe
from posttrain.weights.pipeline_folder import local_folder

IMAGES = 64
TINY = {"resolution": 32, "max_sequence_length": 16}


def write_model(folder: Path, tiny: bool, device: torch.device) -> None:
    """A pipeline as diffusers saves it, with the shipped tiny model's tokenizers."""
    from diffusers import StableDiffusion3Pipeline

    torch.manual_seed(0)
    options = argparse.Namespace(model="tiny" if tiny else "sd35m", text_encoders="tiny", precision="bf16")
    made = model_of(options, 256, device, frozen=True)
    pipeline: Any = made.pipeline
    # a fresh output layer is zero, and every velocity and most gradients with it
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.02)
    shipped = local_folder("posttrain/tiny-sd3")
    base = StableDiffusion3Pipeline.from_pretrained(shipped)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(base, name)
        tokenizer.model_max_length = 256 if name == "tokenizer_3" else 16 if tiny else 77
        pipeline.register_modules(**{name: tokenizer})
    pipeline.save_pretrained(folder)


def write_data(folder: Path, side: int) -> None:
    """Images a little larger than ``side``, their rows, and prompts."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(IMAGES):
        blurred = Image.fromarray(numbers.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        blurred.resize((side + 48, side + 18)).save(folder / "images" / f"{i:03}.jpg")
        rows.append({"md5": f"{i:03}", "caption_en": f"a red circle, number {i}", "bw": side, "bh": side})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"a blue square, number {i}\n" for i in range(64)))


def overrides(recipe: str, work: Path, tiny: bool, given: list[str]) -> list[str]:
    """What makes the shipped recipe run on the made-up model and data."""
    found = load_recipe(recipe, checks=False)
    changed = [f"model.path={work / 'model'}", "evaluation=null"]
    changed += [f"model.max_sequence_length={TINY['max_sequence_length']}"] if tiny else []
    for i, stage in enumerate(found.stages):
        at, data = f"stages.{i}", stage.data.model_dump()
        rows = {"images": work / "train.jsonl", "image_dir": work / "images"}
        if "prompts" in data:
            rows = {"prompts": work / "prompts.txt"}
            changed += [f"{at}.rewards=[jpeg_incompressibility]", f"{at}.monitor=null"]
        changed += [f"{at}.data.{name}={value}" for name, value in rows.items()]
        changed += [f"{at}.data.resolution={TINY['resolution']}"] if tiny else []
        changed += [f"{at}.train.{name}" for name in ("log_every=1", "sample_every=null")]
        changed += [f"{at}.train.checkpoint_every=1000000"]
    return [*changed, *given]


def measured(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the recipe until it has taken its steps, and read what it recorded."""
    shutil.rmtree(work / "run", ignore_errors=True)
    command = [sys.executable, "-m", "posttrain", "run", options.recipe, "--output", str(work / "run")]
    for change in overrides(options.recipe, work, options.tiny, options.set):
        command += ["--set", change]
    began, log = time.monotonic(), (work / "run.log").open("w+")
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    rows: list[dict[str, Any]] = []
    try:
        while child.poll() is None and time.monotonic() - began < options.seconds:
            time.sleep(0.5)
            found = [read_metrics(file) for file in (work / "run").glob("*/metrics.jsonl")]
            rows = [row for row in (found[0] if found else []) if "images_per_second" in row]
            if len(rows) > options.steps:
                break
        used = used_gb()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    text = re.sub(r"\x1b\[[0-9;]*m", "", Path(log.name).read_text("utf-8"))
    tried = [file.read_text("utf-8") for file in (work / "run").glob("*/micro_batch.json")]
    print(text, *tried, sep="\n", file=sys.stderr)
    chosen = re.search(r"chosen by trying.*?(?=\n\S*\s*\n|\Z)", text, re.DOTALL)
    figures: dict[str, Any] = {
        "chosen": " ".join(chosen[0].split())[:400] if chosen else None,
        "first": rows[0]["time"] if rows else None,
        "started": time.monotonic() - began - rows[-1]["time"] if rows else None,
    }
    if len(rows) < 2:
        return {**figures, "error": f"{len(rows)} steps in {options.seconds} s: {text[-600:]}"}
    batch = load_recipe(options.recipe, options.set, checks=False).stages[0].train.batch_size
    seconds = (rows[-1]["time"] - rows[0]["time"]) / (len(rows) - 1)
    return {
        **figures,
        "steps": len(rows) - 1,
        "samples_per_second": batch / seconds,
        "seconds": seconds,
        "peak_gb": used,
    }


def used_gb() -> float | None:
    """GB of the GPU that its processes hold, with what they keep for later; None where nothing tells."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return float(told.stdout.split()[0]) * 2**20 / 1e9
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps beyond the first")
    parser.add_argument("--seconds", type=float, default=240.0, help="the run is ended after that time")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, on this machine")
    parser.add_argument("--prepare", action="store_true", help="write the model and the data, and end")
    parser.add_argument("--set", action="append", default=[], help="a change of the recipe")
    parser.add_argument("--name", help="of the entry; the recipe's by default")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT", "runs/gpu"))
    work = Path(os.environ.get("WORK", out / "work"))
    # a time limit ends the run too, which would go on beside what is measured next
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    is_there = (work / "model" / "model_index.json").is_file()
    if not is_there and options.prepare:
        shutil.rmtree(work, ignore_errors=True)
        write_data(work, TINY["resolution"] if options.tiny else 512)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_model(work / "model", options.tiny, device)
    if options.prepare:
        return
    if not is_there:
        # in a process of its own, since this one would keep memory of the GPU while the run is measured
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--prepare"], check=True)
    figures = {k: v for k, v in measured(options, work).items() if v is not None}
    figures = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    line = json.dumps({"source": "run", "entry": options.name or f"{options.recipe} as shipped", **figures})
    print(line, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "gpu.jsonl").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
