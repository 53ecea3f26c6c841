"""Pairs of images are read, cropped alike, cached, and made of Pick-a-Pic's parquet files and of Shapes."""

import io
import json
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from data_files import noise, pixels, write_rows
from PIL import Image
from pipelines import load
from ranks import on_ranks
from rich.console import Console
from runs import HEAD

from posttrain.data.family import Opening
from posttrain.data.pair_data import PairData, ShapesPairData
from posttrain.data.pair_rows import pair_sources, read_pairs
from posttrain.data.settings import PairList
from posttrain.distributed.world import ALONE, World
from posttrain.errors import DataError, PosttrainError
from posttrain.planning.scan import scan_data
from posttrain.recipe.file import parse_recipe
from posttrain.rewards.shapes import Shapes
from posttrain.shapes.dataset import scene_at
from posttrain.shapes.pairs import build_pairs, rejected_scene, shows
from posttrain.shapes.scene import Thing
from posttrain.stages.caches import fill_for_stage


def pairs_in(folder, count=8, **columns):
    """``count`` pairs whose rejected image is the chosen one inverted, in sizes that have to be cropped."""
    rows = []
    for i in range(count):
        colors = noise(40 + 8 * (i % 3), 30, seed=i)
        for side, values in (("c", colors), ("r", 255 - colors)):
            Image.fromarray(values).save(folder / f"{side}{i}.png")
        rows.append({"prompt": f"prompt {i}", "chosen": f"c{i}.png", "rejected": f"r{i}.png"} | columns)
    return write_rows(folder, rows, "pairs.jsonl")


def taken(sources, count, batch_size=3):
    streams = [sources[side].batches(batch_size, (7, 0)) for side in ("chosen", "rejected")]
    return list(islice(zip(*streams, strict=True), count))


def test_the_images_of_a_pair_are_cropped_and_mirrored_alike_in_every_epoch(tmp_path):
    spec = PairList(pairs=pairs_in(tmp_path), resolution=16, flip=True)
    sources = pair_sources(spec, 8)
    seen = {}
    for chosen, rejected in taken(sources, 12):
        assert chosen.ids == rejected.ids
        assert chosen.captions == rejected.captions == [f"prompt {i}" for i in chosen.ids]
        # an inverted image has inverted pixels where crop and mirror are the same, up to resampling
        assert (chosen.pixels + rejected.pixels).abs().max() < 0.02
        for i, cropped in zip(chosen.ids, chosen.pixels, strict=True):
            seen.setdefault(i, []).append(cropped)
    assert any(not torch.equal(some[0], other) for some in seen.values() for other in some[1:])


def test_the_chosen_image_decides_the_bucket_of_both(tmp_path):
    Image.fromarray(noise(64, 32)).save(tmp_path / "wide.png")
    Image.fromarray(noise(32, 64)).save(tmp_path / "tall.png")
    rows = [
        {"prompt": "a", "chosen": "wide.png", "rejected": "tall.png"},
        {"prompt": "b", "chosen": "tall.png", "rejected": "wide.png"},
        {"prompt": "c", "chosen": "wide.png", "rejected": "tall.png", "bw": 16, "bh": 24},
    ]
    file = write_rows(tmp_path, rows)
    sources = pair_sources(PairList(pairs=file, resolution=32), 8)
    buckets = sources["chosen"].bucket_of
    assert buckets == sources["rejected"].bucket_of
    assert buckets[0] == buckets[1][::-1] == (48, 24)
    assert buckets[2][0] < buckets[2][1]
    own = pair_sources(PairList(pairs=file, tolerance=1.0), 8)
    assert own["chosen"].bucket_of == own["rejected"].bucket_of == {2: (16, 24)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "c0.png", "rejected": "r0.png"}, "no 'prompt'"),
        ({"prompt": " ", "chosen": "c0.png", "rejected": "r0.png"}, "'prompt' is empty"),
        ({"prompt": "x", "chosen": "c0.png"}, "no 'rejected'"),
        ({"prompt": "x", "chosen": 3, "rejected": "r0.png"}, "'chosen' must be text"),
        ({"prompt": "x", "chosen": "c0.png", "rejected": "none.png"}, "no such file"),
        ({"prompt": "x", "chosen": "../c0.png", "rejected": "r0.png"}, "'chosen' must not leave"),
        ({"prompt": "x", "chosen": "c0.png", "rejected": "c0.png"}, "the same image"),
        ({"prompt": "x", "chosen": "c0.png", "rejected": "r0.png", "bw": 8}, "'bh' must be"),
    ],
)
def test_a_bad_row_is_named_by_line_and_the_others_stay(tmp_path, row, reason):
    good = json.loads(pairs_in(tmp_path, 1).read_text())
    spec = PairList(pairs=write_rows(tmp_path, [good, row]), tolerance=0.5, resolution=16)
    chosen, rejected = read_pairs(spec)
    (problem,) = chosen.problems
    assert (problem.line, chosen.problems) == (2, rejected.problems)
    assert reason in problem.reason
    assert [record.path.name for record in (*chosen.records, *rejected.records)] == ["c0.png", "r0.png"]
    assert (chosen.rows, chosen.files["count"]) == (2, 2)
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used \(allowed: 0"):
        read_pairs(spec.model_copy(update={"tolerance": 0.4}))


def opened(data, folder, batch_size=3, world=ALONE):
    return data.open(Opening(load(), folder, batch_size, world=world))


def damage(folder):
    """Damage the chosen image of the second pair, and the rejected one of the fourth."""
    (folder / "c1.png").write_bytes((folder / "c1.png").read_bytes()[:200])
    (folder / "r3.png").write_bytes(b"no image")


def test_a_pair_of_which_one_image_is_damaged_is_left_out_whole_and_counted(tmp_path):
    file = pairs_in(tmp_path, bw=16, bh=16)
    damage(tmp_path)
    source = opened(PairData(pairs=file, tolerance=0.25), tmp_path)
    seen = [i for _, batch, draws in islice(source.batches((0,), 0), 3) for i in draws.ids]
    assert sorted(seen) == [0, 2, 4, 5, 6, 7]
    assert [line.split(":")[0] for line in source.skipped()] == ["2", "4"]


def test_the_damaged_images_of_both_lists_count_together(tmp_path):
    source = opened(PairData(pairs=pairs_in(tmp_path, bw=16, bh=16), tolerance=0.125), tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=r"2 of 8 rows cannot be used \(allowed: 1"):
        list(islice(source.batches((0,), 0), 4))


def test_a_batch_in_which_no_pair_is_whole_is_left_out(tmp_path):
    file = pairs_in(tmp_path, 4, bw=16, bh=16)
    damage(tmp_path)
    source = opened(PairData(pairs=file, tolerance=0.5), tmp_path, 1)
    found = [(number, list(draws.ids)) for number, _, draws in islice(source.batches((0,), 0), 6)]
    assert [number // 4 for number, _ in found] == [0, 0, 1, 1, 2, 2]
    assert sorted(i for _, ids in found for i in ids) == [0, 0, 0, 2, 2, 2]


CACHED = """
cache: {{latents: mean_logvar, path: {folder}/cache}}
stages:
  - name: dpo
    algorithm: {{type: dpo}}
    data: {{pairs: {file}, resolution: 16, crop: center, flip: true}}
    train: {{steps: 1, batch_size: 3, sample_every: null}}
"""


def test_cached_latents_of_pairs_are_equal_to_the_bit_and_need_central_crops(tmp_path, monkeypatch):
    text = HEAD + CACHED.format(folder=tmp_path, file=pairs_in(tmp_path))
    made = parse_recipe(text, "r.yaml")
    (stage,), printed = made.stages, io.StringIO()
    plain, cached = (opened(stage.data, tmp_path) for _ in range(2))
    fill_for_stage(made, stage, cached.model, cached, Console(file=printed, width=200))
    assert "dpo: chosen: latents: 16 of 16" in printed.getvalue()
    assert "dpo: rejected: latents: 16 of 16" in printed.getvalue()
    expected = list(islice(plain.batches((0, 0), 0), 4))
    monkeypatch.setattr(type(cached.model), "posterior", None)
    for (number, one, _), (other_number, other, _) in zip(
        expected, islice(cached.batches((0, 0), 0), 4), strict=True
    ):
        assert number == other_number
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.fields["rejected"], other.fields["rejected"])
        assert not torch.equal(one.latents, one.fields["rejected"])
    with pytest.raises(PosttrainError, match=r"data\.crop.*'random' draws another crop"):
        parse_recipe(text.replace("crop: center", "crop: random"), "r.yaml")


@pytest.mark.parametrize("cached", [False, True])
def test_processes_share_the_pairs_and_fill_up_both_images(tmp_path, cached):
    data = PairData(pairs=pairs_in(tmp_path, 4), resolution=16, crop="center")
    made = parse_recipe(HEAD + CACHED.format(folder=tmp_path, file=data.pairs), "r.yaml")

    models = [load(), load()]  # a rank is a thread, and tokenizers are not made for that

    def work(world: World):
        source = data.open(Opening(models[world.rank], tmp_path, 3, world=world))
        if cached:
            fill_for_stage(made, made.stages[0], source.model, source, Console(quiet=True), ALONE)
        return [batch for _, batch, _ in islice(source.batches((0,), 0), 2)]

    alone, (first, second) = work(ALONE), on_ranks(2, work)
    for whole, one, two in zip(alone, first, second, strict=True):
        assert len(one) == len(two)
        assert one.total == two.total == len(whole)
        for part in (one, two):
            for row, place in enumerate(part.sample_index.tolist()):
                assert place == -1 or torch.equal(part.latents[row], whole.latents[place])
                assert place == -1 or torch.equal(
                    part.fields["rejected"][row], whole.fields["rejected"][place]
                )
        assert sorted([*one.sample_index.tolist(), *two.sample_index.tolist()])[-len(whole) :] == list(
            range(len(whole))
        )


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(file, "PNG")
    return file.getvalue()


def pick_a_pic(folder, labels, **columns):
    """A parquet file in Pick-a-Pic's layout; red is image 0, blue image 1."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = {
        "caption": [f"prompt {i}" for i in range(len(labels))],
        "jpg_0": [png("red")] * len(labels),
        "jpg_1": [png("blue")] * len(labels),
        "label_0": [first for first, _ in labels],
        "label_1": [second for _, second in labels],
        "user_id": [7] * len(labels),
    } | columns
    parquet.write_table(pa.table(rows), folder / "train-0.parquet", row_group_size=2)
    return folder / "train-0.parquet"


def colors(source, count=1):
    """Prompt -> the mean red and blue of its chosen image."""
    chosen = source.images["chosen"]
    return {
        b.captions[n]: b.pixels[n].mean((1, 2))[[0, 2]].tolist()
        for b in islice(chosen.batches(8, (0,)), count)
        for n in range(len(b.ids))
    }


@pytest.mark.usefixtures("own_caches")
@pytest.mark.parametrize("whole_folder", [False, True])
def test_pick_a_pic_says_which_image_was_preferred_and_its_ties_are_left_out(tmp_path, whole_folder):
    (folder := tmp_path / "data").mkdir()
    file = pick_a_pic(folder, [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (None, None), (0.0, 0.0)])
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "half.parquet").write_bytes(b"PAR1")
    data = PairData(pairs=tmp_path if whole_folder else file, resolution=16)
    assert list(data.problems()) == []
    assert data.facts("data").prompts == 5
    assert data.facts("data").images == 10
    source = opened(data, tmp_path / "work", 8)
    assert colors(source) == {"prompt 0": [1.0, -1.0], "prompt 1": [-1.0, 1.0]}
    assert source.notes == ["left out, without a preference: 3 rows"]
    assert not (tmp_path / "work").exists()  # images are read where they lie
    (_, batch, _) = next(source.batches((0,), 0))
    assert sorted(row["prompt"] for row in batch.metadata) == ["prompt 0", "prompt 1"]
    assert all(row == {"prompt": row["prompt"], "user_id": 7} for row in batch.metadata)


@pytest.mark.usefixtures("own_caches")
def test_which_image_of_a_table_was_preferred_is_noticed(tmp_path):
    file, digests = pick_a_pic(tmp_path, [(1.0, 0.0), (0.0, 1.0)]), []
    for labels in ([(1.0, 0.0), (0.0, 1.0)], [(1.0, 0.0), (1.0, 0.0)]):
        pick_a_pic(tmp_path, labels)
        digests.append(opened(PairData(pairs=file, resolution=16), tmp_path, 8).digests())
    assert digests[0].keys() == {"captions"}
    assert digests[0] != digests[1]


@pytest.mark.usefixtures("own_caches")
def test_rows_of_tables_may_name_their_sizes(tmp_path):
    file = pick_a_pic(tmp_path, [(1.0, 0.0)] * 2, bw=[16, 24], bh=[16, 16])
    data = PairData(pairs=file)
    assert data.facts("x").size == (16, 24)
    assert opened(data, tmp_path).first.bucket_of == {0: (16, 16), 1: (24, 16)}


@pytest.mark.usefixtures("own_caches")
def test_bad_rows_of_parquet_files_are_counted_and_named_by_their_number(tmp_path):
    second = [png("blue"), b"", None, png("red"), png("blue")]
    labels = [(0.5, 0.5), *[(1.0, 0.0)] * 3, (0.0, 1.0)]
    file = pick_a_pic(tmp_path, labels, jpg_1=second)
    source = opened(PairData(pairs=file, resolution=16, tolerance=0.75), tmp_path / "work", 8)
    assert source.skipped() == [
        f"{file}:2: the image has zero bytes",
        f"{file}:3: no image: neither bytes nor a path",
        f"{file}:4: 'chosen' and 'rejected' are the same image ({source.first.records[3].path})",
    ]
    assert (source.first.rows, [*source.first.records]) == (4, [3])


def test_parquet_files_that_cannot_be_used_say_why(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken\.parquet: not a parquet file"):
        opened(PairData(pairs=tmp_path / "broken.parquet", resolution=16), tmp_path / "work")
    (tmp_path / "broken.parquet").unlink()
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"caption": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"no column 'jpg_0', 'jpg_1', 'label_0', 'label_1'; it has caption"):
        opened(PairData(pairs=tmp_path, resolution=16), tmp_path / "work")
    wrong = {name: [1] for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")}
    parquet.write_table(pa.table(wrong), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"'jpg_0' holds int64, neither bytes of images nor paths"):
        opened(PairData(pairs=tmp_path, resolution=16), tmp_path / "work")


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_pairs_in_tables_name_the_extra_that_they_need(tmp_path, library, monkeypatch):
    data = PairData(pairs=pick_a_pic(tmp_path, [(1.0, 0.0)]), resolution=16)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=rf"{library}, which is missing: pip install 'posttrain\[data\]'"):
        opened(data, tmp_path)


def test_what_is_missing_is_named_by_its_field(tmp_path):
    (tmp_path / "empty").mkdir()
    problems = PairData(pairs=tmp_path / "none.jsonl", image_dir=tmp_path / "nowhere").problems
    assert [field for field, _ in problems()] == ["pairs", "image_dir"]
    ((field, message),) = PairData(pairs=tmp_path / "empty").problems()
    assert (field, "without a .parquet file" in message) == ("pairs", True)


def test_the_plan_knows_the_size_and_how_many_images_there_are(tmp_path):
    data = PairData(pairs=pairs_in(tmp_path, bw=16, bh=24), flip=True)
    facts = data.facts("stages.dpo.data")
    assert (facts.size, facts.prompts, facts.images) == ((24, 16), 8, 32)
    assert data.model_copy(update={"resolution": 32}).facts("x").size == (32, 32)
    elsewhere = PairData(pairs=tmp_path / "none.jsonl")
    with pytest.raises(PosttrainError, match=r"^stages\.dpo\.data\.resolution: without it"):
        elsewhere.facts("stages.dpo.data")
    assert elsewhere.model_copy(update={"resolution": 32}).facts("x").images is None
    assert ShapesPairData(pairs=5).facts("x").images == 10


def test_rendered_pairs_show_what_the_prompt_asks_for_and_what_it_does_not(tmp_path):
    build_pairs(tmp_path / "pairs", 24, 3)
    rows = [json.loads(row) for row in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    metadata = [scene_at(3, i).metadata for i in range(24)]
    assert [row["prompt"] for row in rows] == [m["prompt"] for m in metadata]
    score = Shapes(score="strict").load(torch.device("cpu"))
    for side, least, most in (("chosen", 0.95, 1.0), ("rejected", 0.0, 0.05)):
        files = [tmp_path / "pairs" / "images" / row[side] for row in rows]
        images = torch.stack([torch.tensor(pixels(file)).permute(2, 0, 1) / 255 for file in files])
        mean = score(images, [row["prompt"] for row in rows], metadata).value.float().mean()
        assert least <= mean <= most, side
    assert len({scene_at(3, i).metadata["tag"] for i in range(24)}) == 6
    assert rejected_scene(3, 5) == rejected_scene(3, 5) != rejected_scene(4, 5)


def test_whether_shapes_are_what_is_asked_for():
    red, blue = Thing("circle", "red", 10, 10, 8), Thing("square", "blue", 40, 10, 8)
    circle, square = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
    assert shows([red, blue], [circle, square])
    assert not shows([red], [circle, square])
    assert not shows([red, red], [circle])
    assert shows([red], [{**circle, "color": "red"}])
    assert not shows([red], [{**circle, "color": "blue"}])
    assert shows([red, blue], [square, {**circle, "position": ["left of", 0]}])
    assert not shows([red, blue], [square, {**circle, "position": ["right of", 0]}])
    assert not shows([red, blue], [square, {**circle, "position": ["above", 0]}])


@pytest.mark.parametrize("tolerance", [0.5, 0.1])
def test_a_scan_reads_both_images_of_every_pair(tmp_path, tolerance):
    file, printed = pairs_in(tmp_path, bw=16, bh=16), io.StringIO()
    damage(tmp_path)
    text = HEAD + CACHED.format(folder=tmp_path, file=file).replace(
        "resolution: 16", f"resolution: 16, tolerance: {tolerance}"
    )
    made = parse_recipe(text, "r.yaml")
    console = Console(file=printed, width=300)
    if tolerance < 0.2:
        with pytest.raises(
            DataError, match=r"dpo: 2 of 8 rows cannot be used, more than the tolerated 10\.0%"
        ):
            scan_data(made, console)
    else:
        scan_data(made, console)
    lines = printed.getvalue().splitlines()
    assert [line.split(":")[1] for line in lines if line.startswith(str(file))] == ["2", "4"]
    told = [line.removeprefix("dpo: ") for line in lines if line.startswith("dpo: ")]
    told = told[[line.startswith(str(file)) for line in told].index(True) :]
    assert told[0].startswith(f"{file} (1 .jsonl file): 8 rows, 2 of them bad: 1 ")
    assert told[1].startswith("1 size (width x height: pairs): 16 x 16: 8")
    assert told[2].startswith("an epoch is 3 steps: 3 batches of 2.67 pairs on average (batch_size 3)")
    assert told[3] == "8 different captions, of 8 to 8 characters"
    assert not any("bytes of another" in line for line in told)


def test_two_images_of_equal_bytes_are_no_pair(tmp_path):
    file = pairs_in(tmp_path, 2, bw=16, bh=16)
    (tmp_path / "r1.png").write_bytes((tmp_path / "c1.png").read_bytes())
    chosen, _ = read_pairs(PairList(pairs=file, tolerance=0.5))
    assert [problem.reason for problem in chosen.problems] == ["'chosen' and 'rejected' are the same image"]


def test_a_pair_has_the_weight_and_the_columns_of_its_row(tmp_path):
    file = pairs_in(tmp_path, 4, bw=16, bh=16, weight=3.0, rater="b")
    source = opened(PairData(pairs=file), tmp_path, 4)
    (_, batch, draws) = next(source.batches((0,), 0))
    assert [row["prompt"] for row in batch.metadata] == [f"prompt {i}" for i in draws.ids]
    assert {(row["weight"], row["rater"]) for row in batch.metadata} == {(3.0, "b")}
    assert all({"chosen", "rejected", "bw"}.isdisjoint(row) for row in batch.metadata)


def test_a_scan_says_that_the_run_makes_the_images():
    printed = io.StringIO()
    stages = [SimpleNamespace(name="dpo", data=ShapesPairData(pairs=3))]
    scan_data(
        SimpleNamespace(stages=stages, model=SimpleNamespace(sides=lambda: None)), Console(file=printed)
    )
    assert printed.getvalue() == "dpo: the run makes its images first, so none is read\n"
