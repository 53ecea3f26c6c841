"""Prints the lines of ``gpu.jsonl`` as a table.

python benchmarks/gpu_report.py runs/gpu/gpu.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "samples_per_second": "samples/s",
    "mfu": "MFU",
    "peak_gb": "peak, GB",
    "seconds": "s a call",
    "first": "first call, s",
}


def rows(line: dict[str, Any]) -> list[str]:
    """One row of Markdown for each figure of an entry."""
    name = line["entry"]
    if reason := line.get("error") or line.get("skipped"):
        return [f"| {name} | {reason[:90]} |" + " |" * len(COLUMNS)]
    parts = {key: value for key, value in line.items() if isinstance(value, dict) and "seconds" in value}
    if parts:
        return [row for key, value in parts.items() for row in rows({"entry": f"{name}, {key}", **value})]
    if "samples_per_second" not in line:
        return []
    figures = [f"{line[c]:.4g}" if line.get(c) is not None else "" for c in COLUMNS]
    extra = [f"{k} {line[k]}" for k in ("micro_batch", "rows", "budget", "linears") if k in line]
    if "slice" in line:
        of = f" of {line['of']}, the rest extrapolated" if "of" in line else ""
        extra.append(f"{line['slice']} samples{of}")
    if "chosen" in line:
        extra.append(line["chosen"])
    if line.get("ratio_off_1") is not None:
        extra.append(f"|ratio - 1| at most {line['ratio_off_1']:.2g}")
    return [f"| {name} | {'; '.join(extra).replace('|', '/')} | " + " | ".join(figures) + " |"]


def main() -> None:
    lines = [json.loads(text) for text in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["entry"] == "device":
            print(f"{line['name']}, torch {line['torch']}, bf16 products {line['matmul_tflops']:.4g} TFLOP/s")
    for source in ("run", "table", "lab"):
        print(f"\n| {source} | what | " + " | ".join(COLUMNS.values()) + " |")
        print("| --- " * (len(COLUMNS) + 2) + "|")
        for line in lines:
            if line["source"] == source:
                for row in rows(line):
                    print(row)
    for line in lines:
        if "shares" in line:
            total = f"{line['kernel_ms']:.4g} ms in {line['kernels']} kernels"
            print(f"\n{line['entry']}: {total}: {line['shares']}")


if __name__ == "__main__":
    main()
