"""Files that a page's reader has by then: what ``<!-- given: NAME -->`` above a block puts into the page's folder."""

import json
import shutil
import tempfile
from pathlib import Path

import forked
from filelock import FileLock
from pages import ROOT

CAPTIONS = ["a photo of a red circle", "a photo of a blue square", "a photo of two green triangles"]
DEMO = """
name: demo
tracker: none
model: {type: sd3, path: posttrain/tiny-sd3, max_sequence_length: 16}
stages:
  - name: sft
    algorithm: {type: sft}
    data: &images {type: shapes, images: 8}
    train: &train {steps: 2, batch_size: 4, learning_rate: 1e-3, sample_every: null}
  - name: lora
    algorithm: {type: sft}
    tune: {type: lora, rank: 2}
    data: *images
    train: *train
"""


def _once(made, name, target, make):
    """Copy to ``target`` what ``make(folder)`` writes. It is made once for all pages and processes, in ``made``."""
    made.mkdir(parents=True, exist_ok=True)
    with FileLock(made / f"{name}.lock"):
        if not (made / name).exists():
            with tempfile.TemporaryDirectory(dir=made) as begun:
                make(Path(begun) / name)
                (Path(begun) / name).rename(made / name)
    shutil.copytree(made / name, target)


def _quickstart(folder, made, name="quickstart"):
    def make(target):
        forked.posttrain("run", "quickstart", "--smoke", "--output", target, cwd=target.parent)

    _once(made, "quickstart", folder / "runs" / name, make)


def _demo(folder, made):
    def make(target):
        (target.parent / "demo.yaml").write_text(DEMO)
        forked.posttrain("run", "demo.yaml", "--output", target, cwd=target.parent)

    _once(made, "demo", folder / "runs" / "demo", make)


def _photos(folder, made):
    """Twelve images with captions, of two sizes."""
    from PIL import Image

    for i in range(12):
        file = folder / "photos" / f"{i:03}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((64, 64) if i % 3 else (80, 48)).rotate(30 * i).convert("RGB").save(
            file
        )
        file.with_suffix(".txt").write_text(CAPTIONS[i % 3])


def _samples(folder, made):
    """Three images, without captions."""
    from PIL import Image

    (folder / "samples").mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(folder / "samples" / f"{i}.png")


def _prompts(folder, made):
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))


def _geneval(folder, made):
    rows = [
        {
            "tag": "single_object",
            "include": [{"class": "circle", "count": 1}],
            "prompt": "a photo of a circle",
        }
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))


def _recipe(folder, made):
    """A recipe that trains on ``photos``."""
    text = DEMO.replace("name: demo", "name: mine").replace(
        "{type: shapes, images: 8}", "{images: photos, resolution: 64}"
    )
    (folder / "mine.yaml").write_text(text)


def _conformance(folder, made):
    shutil.copytree(ROOT / "conformance", folder / "conformance")


def _two_runs(name):
    def make(folder, made):
        _quickstart(folder, made, name)

    return make


GIVEN = {
    "runs/quickstart": _quickstart, "runs/shapes-nft": _two_runs("shapes-nft"), "runs/shapes-grpo": _two_runs("shapes-grpo"),
    "runs/demo": _demo, "mine.yaml": _recipe, "conformance": _conformance, "photos": _photos, "samples": _samples,
    "prompts.txt": _prompts, "p.jsonl": _geneval,
}  # fmt: skip
"""Name -> what makes it in a folder. ``runs/demo`` has the stages sft (full) and lora; ``photos`` has captions,
``samples`` are three images; ``prompts.txt`` has three prompts, and ``p.jsonl`` three in GenEval's format."""
