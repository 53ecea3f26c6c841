"""Draws the README's picture: a row for each model of a finished run, a column for each prompt of its grid.

    posttrain run quickstart && python benchmarks/quickstart_picture.py runs/quickstart docs/quickstart.png

The columns are the first prompts of the evaluation's grid, in its order: none is chosen by its images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from posttrain.support.images import in_lines
from posttrain.support.records import read_object

TILE, GAP, LEFT, TOP, FONT = 128, 8, 64, 40, 13


def picture(run: Path, columns: int) -> Image.Image:
    """The images of the base model and of every stage of ``run``, of the first ``columns`` prompts."""
    names = [stage["name"] for stage in read_object(run / "run.json", "stages")["stages"]]
    prompts = read_object(run / "base" / "evaluation" / "eval.json", "grid_prompts")["grid_prompts"][:columns]
    font = ImageFont.load_default(FONT)
    size = (LEFT + len(prompts) * (TILE + GAP), TOP + len(names) * (TILE + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        words = in_lines(prompt.removeprefix("a photo of "), TILE, font)
        draw.multiline_text((LEFT + column * (TILE + GAP), GAP), "\n".join(words), "black", font, spacing=2)
    for row, name in enumerate(names):
        y = TOP + row * (TILE + GAP)
        draw.text((GAP, y + TILE // 2 - FONT // 2), name, "black", font)
        files = sorted((run / name / "evaluation" / "grid").glob("*.png"))
        for column, file in zip(range(len(prompts)), files, strict=False):
            with Image.open(file) as image:
                tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (LEFT + column * (TILE + GAP), y))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("file", type=Path, help="the PNG to write")
    parser.add_argument("--columns", type=int, default=8)
    arguments = parser.parse_args()
    picture(arguments.run, arguments.columns).save(arguments.file, optimize=True)


if __name__ == "__main__":
    main()
