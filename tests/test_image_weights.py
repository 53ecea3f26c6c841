"""The column ``weight`` weights an image's items, and other columns reach algorithms as metadata."""

import pytest
import torch
from by_hand import SHAPE, Given, conditions, linear_policy, near
from data_files import folder_of, write_rows
from image_layouts import COUNT, LAYOUTS, columns
from PIL import Image

from posttrain.algorithm import Batch, Tools
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.cache.latents import LatentCache
from posttrain.cache.room import Room
from posttrain.cache.store import Store
from posttrain.data import Images
from posttrain.data.family import Opening
from posttrain.data.image_data import ImageData
from posttrain.data.rows import read_records
from posttrain.testing.toys import Thumbnails

WEIGHTS = [2.0, 1.0, 0.5, 3.0]


def batch(rows):
    latents = torch.arange(2.0 * 4).view(4, *SHAPE) / 4 - 1
    return Batch(latents, torch.tensor([1, 2, 3, 1]), conditions(), rows)


ROWS = [
    {"prompt": "a", "weight": 2.0},
    {"prompt": "b"},
    {"prompt": "c", "weight": 0.5},
    {"prompt": "d", "weight": 3},
]


def collected(algorithm, rows, **values):
    tools = Tools(linear_policy(0.5), Given(("a stage",), range(4), values=values))
    with torch.no_grad():
        return algorithm.collect(batch(rows), tools)


def test_sft_weights_an_images_item_by_its_row():
    assert collected(SFT(), ROWS).weight.tolist() == WEIGHTS
    assert collected(SFT(), ()).weight.tolist() == [1.0] * 4
    assert collected(SFT(), [{"prompt": "a"}] * 4).weight.tolist() == [1.0] * 4


def test_soar_weights_all_items_of_an_image_and_leaves_out_those_that_it_leaves_out():
    soar = SOAR(lambda_aux=0.5, num_rollout_paths=2, trajectory_length=2, num_sampling_steps=10)
    # the third image is so near its end that no stochastic path is left of it
    items = collected(soar, ROWS, timestep=torch.tensor([0.0, 1.0, -9.0, 2.0]))
    ode = [w / 2 for w in WEIGHTS]
    sde = [w / 2 for w in (2.0, 1.0, 0.0, 3.0)]
    near(items.weight, torch.tensor([*WEIGHTS, *ode, *ode, *sde, *sde]))
    assert items.sample_index.tolist() == [0, 1, 2, 3] * 5


def test_the_step_is_the_weighted_mean_over_images():
    items = collected(SFT(), ROWS)
    plain = collected(SFT(), ())
    losses = SFT().loss(plain, linear_policy(0.5)).per_item
    expected = sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)) / 6.5
    near((losses * items.weight).sum() / items.weight.sum(), expected)
    assert abs(expected - losses.mean()) > 1e-3


@pytest.mark.parametrize("cached", [False, True])
def test_other_columns_reach_the_batch_with_and_without_a_cache(tmp_path, cached):
    data = ImageData(images=LAYOUTS["jsonl"](tmp_path), resolution=32, crop="center")
    model = Thumbnails()
    source = data.open(Opening(model, tmp_path, 4))
    if cached:
        store = Store(Room(tmp_path / "cache", 10**8), "images", {}, None, print)
        source.latents["images"] = LatentCache(store, model, source.images["images"], "mean_logvar")
    stream = source.batches((0, 0), 0)
    for _ in range(2):
        _, got, draws = next(stream)
        assert len(got.metadata) == len(got) == len(draws.ids)
        for row, i in zip(got.metadata, draws.ids, strict=True):
            assert row == {"prompt": f"caption {i}", **columns(i)}
    assert len(source.images["images"].records) == COUNT


@pytest.mark.parametrize(
    ("weight", "fits"),
    [(1, True), (1e-6, True), (1e6, True), (0, False), (-1, False), (1e-7, False), (1e7, False), (True, False),
     ("1", False), ([1], False)],
)  # fmt: skip
def test_a_weight_is_a_number_in_its_range_or_a_problem_of_its_row(tmp_path, weight, fits):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": "x"}
    rows = [row, {**row, "weight": None}, {**row, "weight": weight}]
    table = read_records(Images(images=write_rows(tmp_path, rows), tolerance=1.0))
    assert [r.line for r in table.records] == ([1, 2, 3] if fits else [1, 2])
    assert "weight" not in table.records[1].metadata
    assert all("'weight' must be a number from 1e-06 to 1e+06" in p.reason for p in table.problems)


def test_columns_that_are_used_are_no_metadata(tmp_path):
    table = read_records(Images(images=folder_of(tmp_path, 3, prompt="another", note=[1, None])))
    assert table.records[1].metadata == {"prompt": "caption 1", "note": [1, None]}
