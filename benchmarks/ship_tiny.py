"""Makes the shipped model, with its provenance, of a finished run of tiny-pretrain.

    posttrain run tiny-pretrain && python benchmarks/ship_tiny.py runs/tiny-pretrain "one NVIDIA H100"

It replaces ``posttrain/assets/tiny-sd3``. Run ``benchmarks/count_shipped.py`` afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from posttrain.engine.tracker import read_metrics
from posttrain.weights.pipeline_folder import ASSETS

STAGE = "pretrain"
LOSSES = 12
"""How many losses of the training the provenance has, about equally far apart."""


def provenance(run: Path, final: Path, machine: str) -> dict[str, Any]:
    """How the model in ``final`` was made by ``run``."""
    environment = json.loads((run / "environment.json").read_text())
    summary = json.loads((run / STAGE / "stage.json").read_text())
    records = [row for row in read_metrics(run / STAGE / "metrics.jsonl") if "loss" in row]
    chosen = records[:: max(1, len(records) // LOSSES)] + records[-1:]
    return {
        "command": " ".join(["posttrain", *_without_output(environment["command"][1:])]),
        "recipe": (run / "recipe.yaml").read_text(),
        "date": environment["started"][:10],
        "machine": machine,
        "device": environment["device"],
        "versions": environment["versions"],
        "stages": {
            STAGE: {
                **{key: summary[key] for key in ("steps", "samples", "seconds", "forward_equivalents")},
                "loss": {str(row["step"]): round(row["loss"], 4) for row in chosen},
            }
        },
        "sha256": {
            file.relative_to(final).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(final.rglob("*.safetensors"))
        },
    }


def _without_output(words: list[str]) -> list[str]:
    """``words`` of a command line without ``--output`` and its value, which is a place on one machine."""
    words = [word for word in words if not word.startswith("--output=")]
    if "--output" not in words:
        return words
    at = words.index("--output")
    return words[:at] + words[at + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("machine", help="the machine, in words")
    arguments = parser.parse_args()
    target, final = ASSETS / "tiny-sd3", arguments.run / STAGE / "final"
    made = provenance(arguments.run, final, arguments.machine)
    about = json.loads((final / "posttrain.json").read_text())
    about["model"] = {"type": "sd3", "path": "posttrain/tiny-sd3", "max_sequence_length": 16}
    shutil.rmtree(target)
    shutil.copytree(final, target)  # links become files
    (target / "posttrain.json").write_text(json.dumps(about, indent=2))
    (target / "provenance.json").write_text(json.dumps(made, indent=2))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
