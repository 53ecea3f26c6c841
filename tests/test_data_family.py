"""Data are open: a class of another package, or of this module, gives an algorithm what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from runs import HEAD, recipe, run_quietly, stage

from posttrain.algorithm import Batch
from posttrain.data.family import Data, Facts
from posttrain.data.source import BatchSource
from posttrain.errors import RecipeError
from posttrain.recipe.file import parse_recipe
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import Draws

ROOT = Path(__file__).parent.parent
OUTSIDE = '''
"""Flags: a data source of another package, in one short file."""

import json
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image

from posttrain.data.family import Facts
from posttrain.data.image_data import ImageFiles
from posttrain.data.settings import Images


class Flags(ImageFiles):
    type: Literal["flags"] = "flags"
    colors: list[str]
    """Colours of the flags."""

    def build(self, folder: Path) -> Images:
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / "flags.jsonl"
        for color in self.colors:
            Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
        texts = [{"image": f"{color}.png", "caption": f"a {color} flag"} for color in self.colors]
        rows.write_text("".join(json.dumps(text | {"bw": 16, "bh": 16}) + "\\\\n" for text in texts))
        return Images(images=rows)

    def facts(self, path: str) -> Facts:
        return Facts((16, 16), len(self.colors), len(self.colors))
'''.replace("\\\\n", "\\n")


def test_a_package_of_its_own_adds_data_with_an_entry_point(tmp_path):
    (tmp_path / "flags.py").write_text(OUTSIDE)
    info = tmp_path / "flags-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flags\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.data]\nflags = flags\n")
    made = (
        HEAD
        + "stages:\n"
        + stage("sft").replace("{type: shapes, images: 10, seed: 1}", "{type: flags, colors: [red, blue]}")
    )
    (tmp_path / "r.yaml").write_text(made)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    command = [sys.executable, "-m", "posttrain", "run", "r.yaml", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sft" / "final" / "model_index.json").is_file()
    record = json.loads((tmp_path / "out" / "sft" / "made_from.json").read_text())
    assert record["data"]["images"]["count"] == 2
    assert record["data"]["rows"]["sha256"]


class Dots(BatchSource):
    """Latents of this module's own making, without an image: each is constant, and its prompt says which."""

    def __init__(self, opening, count):
        self.model, self.batch_size, self.count = opening.model, opening.batch_size, count
        self.prompts = [f"a photo of {n} dots" for n in range(count)]
        self.size = self.largest = (16, 16)

    def batches(self, key, start):
        number = start
        while True:
            ids = [(number * self.batch_size + i) % self.count for i in range(self.batch_size)]
            conditions, rows = encode(self.model, [self.prompts[i] for i in ids])
            shape = self.model.latent_shape(*self.size)
            latents = torch.stack([torch.full(shape, i / self.count) for i in ids])
            yield number, Batch(latents, rows, conditions), Draws((*key, number), ids)
            number += 1


class DotData(Data):
    """Data of this module."""

    type: Literal["dots"] = "dots"
    gives: ClassVar = "images"
    count: int
    """Number of kinds."""

    def open(self, opening):
        return Dots(opening, self.count)

    def facts(self, path):
        return Facts((16, 16), self.count)


del Data.variants["dots"]  # other tests compare every type of data that there is


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(Data.variants, "dots", DotData)


def of_dots(algorithm="{type: sft}", count=6):
    """A recipe that trains on the dots: this class is younger than the recipe's field."""
    made = recipe(stage("sft", algorithm), head=HEAD + "cache: {prompts: true}\n")
    dots = made.stages[0].model_copy(update={"data": DotData(count=count)})
    return made.model_copy(update={"stages": [dots]})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_sft_trains_on_a_source_that_has_no_images_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = of_dots()
    printed = run_quietly(made, tmp_path / "run")
    assert "sft: prompts: 7 of 7 are to be encoded" in printed
    records = [
        json.loads(row) for row in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "sft" / "made_from.json").read_text())["data"] == {}


def test_the_plan_counts_no_encoder_for_data_that_encode_no_image():
    from plans import need

    shapes, dots = recipe(stage("sft")), of_dots()
    images = need(shapes)
    own = need(dots)
    assert images.works["encode"].full > own.works["encode"].full == 0
    assert own.training.full > 0


def test_what_an_algorithm_needs_and_data_give_is_one_word_and_one_error():
    with pytest.raises(RecipeError) as refused:
        parse_recipe(HEAD + "stages:\n" + stage("a", "{type: dpo}"), "r.yaml")
    message = str(refused.value)
    assert "dpo needs pairs, and data of type 'shapes' give images: type 'pairs' or 'shapes_pairs'" in message
    assert message.startswith("r.yaml:9: stages.0.data (stage 'a'): ")
    pairs = stage("a", "{type: soar}").replace("shapes, images: 10", "shapes_pairs, pairs: 10")
    with pytest.raises(
        RecipeError,
        match="soar needs images, and data of type 'shapes_pairs' give pairs: type 'dots' or 'images'",
    ):
        parse_recipe(HEAD + "stages:\n" + pairs, "r.yaml")


def test_every_data_class_says_what_it_gives_and_how_many_images_it_encodes():
    found = {name: (data.gives, data.images_per_sample) for name, data in Data.variants.items()}
    assert found == {
        "images": ("images", 1), "shapes": ("images", 1), "pairs": ("pairs", 2), "shapes_pairs": ("pairs", 2),
        "prompts": ("prompts", 0), "dots": ("images", 0),
    }  # fmt: skip


def test_dpo_trains_on_pairs_and_says_how_often_it_agrees(tmp_path):
    text = stage("dpo", "{type: dpo, beta: 500}").replace("shapes, images: 10", "shapes_pairs, pairs: 10")
    run_quietly(recipe(text), tmp_path / "run")
    records = [
        json.loads(row) for row in (tmp_path / "run" / "dpo" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = records[0], records[-1]
    assert first["margin"] == 0, "the policy is still the reference"
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert {"accuracy", "chosen_loss", "rejected_loss"} <= set(last)
    assert last["margin"] != 0


def test_the_plan_counts_both_images_of_a_pair():
    from plans import need, planned

    sft, dpo = need(planned("sft")), need(planned("dpo"))
    assert dpo.works["encode"].full == 2 * sft.works["encode"].full
    assert dpo.training.full == 2 * sft.training.full
    assert dpo.works["rollout"].full == 2 / 3 * sft.training.full  # the reference, at both images
    assert dpo.mode["micro_batch"] == 2 * sft.mode["micro_batch"]
    assert dpo.memory.total > sft.memory.total
