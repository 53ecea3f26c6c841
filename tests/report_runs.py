"""Run folders with results that were not trained for, for tests of the report."""

import json

import numpy as np
from PIL import Image

from posttrain.evaluation.intervals import bootstrap_interval

EVIL = '<script>alert("x")</script> & two'
PROMPTS = ["one red circle", "two blue squares", EVIL, "a star"]
STAGES = ("base", "sft", "soar")


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def summary(values, prompts, **more):
    low, high = bootstrap_interval(values, groups=prompts)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "count": len(values), **more}


def evaluated(folder, scores, higher=True):
    """``scores``: one list of two images' scores for each prompt."""
    rows = [
        {"prompt": p, "index": i, "tag": "kind", "scores": {"shapes": v}}
        for p, pair in zip(PROMPTS, scores, strict=True)
        for i, v in enumerate(pair)
    ]
    values, prompts = [r["scores"]["shapes"] for r in rows], [r["prompt"] for r in rows]
    dump(
        folder / "evaluation" / "eval.json",
        {
            "images": len(rows),
            "scores": {"shapes": summary(values, prompts, higher_is_better=higher, range=[0, 1])},
            "tags": {"kind": {"shapes": summary(values, prompts)}},
            "grid_prompts": PROMPTS[2:],
        },
    )
    (folder / "evaluation" / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "evaluation" / "grid").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i * 80, 90, 10)).save(folder / "evaluation" / "grid" / f"{i:03d}.png")


def trained(folder, forward_equivalents=55_200, **metrics):
    account = {"steps": 300, "samples": 9600, "seconds": 211.0, "images_per_second": 45.1}
    account |= {"forward_equivalents": forward_equivalents, "peak_memory_bytes": 1_300_000_000}
    dump(
        folder / "stage.json",
        account | {"trainable_parameters": 2_134_567, "skipped": ["cat.jpg: truncated"]},
    )
    rows = [{"step": s, "time": s * 1.0, "loss": 1 / s, **metrics} for s in range(1, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated_run(folder):
    """base, sft (no better than chance) and soar (better on every prompt)."""
    stages = [
        {"name": n, "parent": p, "algorithm": n if p else None}
        for n, p in zip(STAGES, (None, "base", "sft"), strict=True)
    ]
    dump(folder / "run.json", {"name": "chain", "stages": stages})
    dump(
        folder / "environment.json",
        {"versions": {"torch": "9.8.7"}, "device": "cpu", "seed": 3, "started": "now"},
    )
    (folder / "recipe.yaml").write_text("name: chain  # <b>bold</b>\n")
    evaluated(folder / "base", [[0.25, 0.5], [0.25, 0.25], [0.5, 0.25], [0.25, 0.5]])
    evaluated(folder / "sft", [[0.5, 0.5], [0.25, 0.125], [0.5, 0.25], [0.25, 0.5]])
    evaluated(folder / "soar", [[0.75, 0.9], [0.75, 0.75], [0.9, 0.75], [0.75, 1.0]])
    trained(folder / "sft")
    trained(folder / "soar", 1_250_000, grad_norm=0.5)
    return folder
