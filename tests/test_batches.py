"""Batches of images are the same for any number of workers and processes, and skip damaged images."""

import json
from itertools import islice

import pytest
import torch
from data_files import folder_of, write_rows
from PIL import Image
from ranks import on_ranks

from posttrain.data import Images
from posttrain.data.family import Opening
from posttrain.data.image_data import ImageData
from posttrain.data.loader import ImageSource
from posttrain.distributed.world import World
from posttrain.errors import DataError
from posttrain.testing.toys import Thumbnails


def taken(source, count, batch_size=4, key=(7, 0), **where):
    return list(islice(source.batches(batch_size, key, **where), count))


def same(one, other):
    return (
        (one.step, one.epoch, one.ids, one.captions, one.bucket)
        == (other.step, other.epoch, other.ids, other.captions, other.bucket)
    ) and torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_epoch_shows_each_image_once_over_all_ranks(tmp_path, world_size, workers):
    source = ImageSource(Images(images=folder_of(tmp_path), workers=workers), 16)
    steps = source.batches_per_epoch(3)
    assert steps == 5
    ranks = range(world_size) if not workers else (0, world_size - 1)
    parts = {rank: taken(source, steps + 1, 3, rank=rank, world_size=world_size) for rank in set(ranks)}
    for batches in parts.values():
        assert [b.step for b in batches] == list(range(steps + 1))
        assert [b.epoch for b in batches] == [0] * steps + [1]
        for b in batches:
            assert b.pixels.shape == (len(b.ids), 3, b.bucket[1], b.bucket[0])
            assert b.captions == [f"caption {i}" for i in b.ids]
    seen = sorted(i for batches in parts.values() for b in batches[:steps] for i in b.ids)
    assert len(set(seen)) == len(seen)
    if len(parts) == world_size:
        assert seen == list(range(12))


def test_workers_resume_and_ranks_do_not_change_a_pixel(tmp_path):
    options = {"images": folder_of(tmp_path), "flip": True}
    source = ImageSource(Images(**options), 16)
    whole = taken(source, 9)
    state = torch.get_rng_state()
    assert all(map(same, whole, taken(ImageSource(Images(**options, workers=2), 16), 9)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(same, whole[5:], taken(source, 4, start_step=5)))
    alone = {(b.step, i): b.pixels[n] for b in whole for n, i in enumerate(b.ids)}
    for rank in range(3):
        for b in taken(source, 9, rank=rank, world_size=3):
            assert all(torch.equal(alone[b.step, i], b.pixels[n]) for n, i in enumerate(b.ids))


def test_crops_and_flips_are_drawn_anew_each_epoch_and_only_if_asked_for(tmp_path):
    def first_image(**options):
        batches = taken(ImageSource(Images(images=folder_of(tmp_path), **options), 16), 5 * 20, 3)
        return [b.pixels[b.ids.index(0)] for b in batches if 0 in b.ids]

    def kinds(images):
        return len({image.numpy().tobytes() for image in images})

    assert kinds(first_image(crop="center")) == 1
    assert kinds(first_image(crop="center", flip=True)) == 2
    assert kinds(first_image(crop="random")) > 2


def test_images_are_flipped_independently_of_each_other(tmp_path):
    file = folder_of(tmp_path)
    plain, flipped = (
        taken(ImageSource(Images(images=file, crop="center", flip=flip), 16), 1, 8)[0].pixels
        for flip in (False, True)
    )
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped, strict=True)]
    assert all(torch.equal(a, b) != m for a, b, m in zip(plain, flipped, mirrored, strict=True))
    assert len(set(mirrored)) == 2


def test_resolution_overrides_the_sizes_of_the_rows_but_keeps_their_shape(tmp_path):
    source = ImageSource(Images(images=folder_of(tmp_path), resolution=32), 8)
    assert set(source.buckets) == {(32, 32), (48, 24)}
    wide = ImageSource(Images(images=folder_of(tmp_path, bw=32, bh=16), resolution=32), 8)
    assert set(wide.buckets) == {(48, 24)}  # as the rows say, whatever the files are
    Image.new("RGB", (60, 30)).save(tmp_path / "wide.png")
    file = write_rows(tmp_path, [{"image": "wide.png", "caption": "x"}], "plain.jsonl")
    assert set(ImageSource(Images(images=file, resolution=32), 8).buckets) == {(48, 24)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_left_out_named_once_and_never_replaced(tmp_path, workers):
    file = folder_of(tmp_path)
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:300])
    source = ImageSource(Images(images=file, tolerance=0.1, workers=workers), 16)
    batches = taken(source, 12, 1)
    assert [i for b in batches[:11] for i in b.ids].count(3) == 0
    assert sorted(i for b in batches[:11] for i in b.ids) == [0, 1, 2, *range(4, 12)]
    assert [b.step for b in batches if b.epoch == 0] == sorted(set(range(12)) - missing_step(source))
    assert [(p.line, p.path) for p in source.skipped] == [(4, tmp_path / "3.jpg")]
    (empty,) = [b for b in taken(source, 12, 1, world_size=2) if b.step in missing_step(source)]
    assert empty.pixels.shape == (0, 3, 16, 16)
    with pytest.raises(DataError, match=r"train.jsonl:4: truncated"):
        ImageSource(Images(images=file, workers=workers), 16)


def missing_step(source):
    from posttrain.data.order import epoch_batches

    return {step for step, ids in enumerate(epoch_batches(source.buckets, 1, (7, 0), 0)) if ids == [3]}


def test_too_many_images_damaged_during_the_run_stop_it(tmp_path):
    source = ImageSource(Images(images=folder_of(tmp_path), tolerance=0.2), 16)
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 12 rows cannot be used \(allowed: 2"):
        taken(source, 20)
    assert len(source.skipped) == 3


@pytest.mark.parametrize("tolerance", [0.1, 0.2])
def test_the_tolerance_counts_what_any_process_met(tmp_path, tolerance):
    file = folder_of(tmp_path)
    plan = ImageSource(Images(images=file), 8).planned_batches(8, (0,))
    damaged = next(p.ids for p in plan if len(p.ids) == 8)
    opened = [  # before the images are damaged
        ImageData(images=file, tolerance=tolerance).open(
            Opening(Thumbnails(), tmp_path, 8, world=World(n, 2))
        )
        for n in range(2)
    ]
    for i in (damaged[0], damaged[-1]):  # one for each process
        (tmp_path / f"{i}.jpg").write_bytes(b"")

    def work(world):
        source = opened[world.rank]
        try:
            list(islice(source.batches((0,), 0), 3))
        except DataError as error:
            return str(error).partition(":")[2].partition(",")[0]
        return sorted(source.skipped())

    first, second = on_ranks(2, work)
    assert first == second
    if tolerance == 0.1:
        assert first == " 2 of 12 rows cannot be used (allowed: 1"
    else:
        assert [line.partition(":")[0] for line in first] == sorted(
            str(i + 1) for i in (damaged[0], damaged[-1])
        )


def test_a_damaged_folder_stops_the_run_at_its_start_and_a_scan_lists_every_problem(tmp_path):
    rows = [json.loads(row) for row in folder_of(tmp_path).read_text().splitlines()]
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_text("not an image")
    file = write_rows(tmp_path, [*rows, *rows * 40, "{"])
    with pytest.raises(DataError, match=r"\d+ of 64 images tried cannot be decoded"):
        ImageSource(Images(images=file), 16)
    progress = []
    problems = ImageSource(Images(images=file, tolerance=1.0), 16).scan(lambda *at: progress.append(at))
    assert [p.line for p in problems] == sorted({*(12 * k + i for k in range(41) for i in range(1, 5)), 493})
    assert progress[-1] == (492, 492)


def test_all_images_bad_is_an_error_even_where_all_may_be_skipped(tmp_path):
    file = folder_of(tmp_path, 3)
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("not an image")
    with pytest.raises(DataError, match="none is left"):
        ImageSource(Images(images=file, tolerance=1.0), 16)


def test_a_rank_outside_the_world_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rank"):
        taken(ImageSource(Images(images=folder_of(tmp_path)), 16), 1, rank=2, world_size=2)
