"""Adds the figures of a session on a GPU to the rates that ``posttrain plan`` counts time with.

    python benchmarks/add_rates.py runs/gpu/gpu.jsonl --commit "$(git rev-parse --short HEAD)"

Reads what ``benchmarks/gpu.sh`` wrote. Entries that failed, were skipped, or measure what no recipe does are
left out. Figures that are in the file already stay: the plan takes the newest of equal rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.planning.counts import Counts
from posttrain.planning.gpus import known_name
from posttrain.planning.rates import FILE
from posttrain.planning.store import store_of
from posttrain.recipe.file import load_recipe

SOAR = {"algorithm": "soar", "rollout": 2, "training": 7, "images": "encoded"}
SFT = {"algorithm": "sft", "training": 1, "images": "encoded"}
GRPO = {"algorithm": "flow_grpo", "resolution": 384, "rollout": 10, "training": 3, "images": "decoded"}
NFT = {"algorithm": "diffusion_nft", "tokens": 128, "rollout": 10, "frozen": 18, "training": 9}
NFT["images"] = "decoded"
SAMPLING = {"kind": "sampling", "micro_batch": 8, "rollout": 80, "images": "decoded"}
FULL, LORA = {"tune": "full"}, {"tune": "lora"}
COMPILED, EAGER = {"compile": True}, {"compile": False}
ENTRIES: dict[str, dict[str, Any]] = {
    "soar compiled off": {**SOAR, **FULL, **COMPILED},
    "soar compiled off 7": {**SOAR, **FULL, **COMPILED},
    "soar compiled 0.5": {**SOAR, **FULL, **COMPILED, "checkpointing": "0.5"},
    "soar compiled 0.2": {**SOAR, **FULL, **COMPILED, "checkpointing": "0.2"},
    "soar compiled full": {**SOAR, **FULL, **COMPILED, "checkpointing": "full"},
    "soar eager off": {**SOAR, **FULL, **EAGER},
    "soar as shipped": {**SOAR, **FULL, **EAGER, "checkpointing": "full"},
    "lora soar compiled off": {**SOAR, **LORA, **COMPILED},
    "lora soar compiled 0.5": {**SOAR, **LORA, **COMPILED, "checkpointing": "0.5"},
    "lora soar compiled 0.2": {**SOAR, **LORA, **COMPILED, "checkpointing": "0.2"},
    "lora soar compiled full": {**SOAR, **LORA, **COMPILED, "checkpointing": "full"},
    "lora soar eager off": {**SOAR, **LORA, **EAGER},
    "sft compiled": {**SFT, **FULL, **COMPILED},
    "grpo compiled": {**GRPO, **LORA, **COMPILED},
    "grpo eager": {**GRPO, **LORA, **EAGER},
    "nft compiled": {**NFT, **LORA, **COMPILED},
    "nft eager": {**NFT, **LORA, **EAGER},
    "sampling compiled": {**SAMPLING, **COMPILED},
    "sampling eager": {**SAMPLING, **EAGER},
}
"""What the entries of ``gpu_table.py`` do, by name."""
MEASURED = ("micro_batch", "samples_per_second", "mfu", "peak_gb")


def session(lines: list[dict[str, Any]], commit: str, date: str) -> dict[str, Any]:
    """The session in the ``lines`` of a ``gpu.jsonl``, as ``rates.json`` has it. Raises SystemExit if it has
    no figure."""
    device = next((line for line in lines if line["entry"] == "device"), None)
    rows = [row for line in lines for row in _rows(line)]
    if device is None or not rows:
        raise SystemExit("no figures of a GPU: give the gpu.jsonl that benchmarks/gpu.sh wrote")
    return {
        "device": known_name(device["name"]),
        "product_tflops": device["matmul_tflops"],
        "date": date,
        "torch": device["torch"],
        "commit": commit,
        "command": "benchmarks/gpu.sh",
        "rows": rows,
    }


def _rows(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if line["source"] != "table":
        return
    for kind in ("encode", "decode"):
        if line["entry"] == "vae" and kind in line:
            speed = line[kind]["samples_per_second"]
            yield {
                "kind": kind,
                "precision": "tf32",
                "image_tflop": _tflop(kind, 512, 256),
                "samples_per_second": speed,
            }
    if (about := ENTRIES.get(line["entry"])) is None or "samples_per_second" not in line:
        return
    row = {"kind": "step", "precision": "bf16", "resolution": 512, "tokens": 256, **about}
    row |= {name: line[name] for name in MEASURED if name in line}
    row["forward_tflop"] = _tflop("forward", row["resolution"], row["tokens"])
    autoencoder = "encode" if row["images"] == "encoded" else "decode"
    row["image_tflop"] = _tflop(autoencoder, row["resolution"], 256)
    if "slice" in line:
        row["note"] = (
            f"{line['slice']} of {line['of']} samples" if "of" in line else f"{line['slice']} images"
        )
    yield row


def _tflop(work: Any, side: int, tokens: int) -> float:
    """TFLOP of the benchmarks' model, Stable Diffusion 3.5 Medium, on one image."""
    model = load_recipe("sd35m-soar", [f"model.max_sequence_length={tokens}"], checks=False).model
    with store_of(model) as store:
        flops = Counts(model, cuda=True, store=store).flops(work, (side, side))
    return float(f"{flops / 1e12:.6g}")


def written(sessions: list[dict[str, Any]]) -> str:
    """The text of ``rates.json``: one row a line."""
    blocks = []
    for one in sessions:
        about = json.dumps({name: value for name, value in one.items() if name != "rows"})[:-1]
        rows = ",\n".join(f"      {json.dumps(row)}" for row in one["rows"])
        blocks.append(f'    {about}, "rows": [\n{rows}\n    ]}}')
    return '{\n  "sessions": [\n' + ",\n".join(blocks) + "\n  ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="gpu.jsonl")
    parser.add_argument("--commit", required=True, help="what was measured")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--rates", type=Path, default=FILE, help="the file to extend")
    options = parser.parse_args()
    lines = [json.loads(text) for text in options.file.read_text("utf-8").splitlines()]
    new = session(lines, options.commit, options.date)
    sessions = json.loads(options.rates.read_text("utf-8"))["sessions"]
    options.rates.write_text(written([*sessions, new]), "utf-8")
    print(f"{len(new['rows'])} rows of {new['device']} added to {options.rates}")


if __name__ == "__main__":
    main()
