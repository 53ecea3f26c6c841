"""Shapes images show what their prompts say, their files keep the format, and the detector judges them rightly."""

import functools
import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from imperfect_shapes import FLAWS, imperfect
from PIL import Image, ImageDraw, ImageFilter

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import ShapesPrompts
from posttrain.errors import DataError, PosttrainError, RewardError
from posttrain.reward import checked
from posttrain.rewards._geneval import graded, lenient, strict
from posttrain.rewards.shapes import Shapes
from posttrain.shapes import dataset
from posttrain.shapes.dataset import build, evaluation_prompts, scene_at
from posttrain.shapes.detect import detect
from posttrain.shapes.render import render
from posttrain.shapes.scene import COLORS, GAP, RELATIONS, SIZE, STYLES, TASKS, VOCABULARY

SCENES = 1200


def pixels(image):
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


def as_jpeg(image, index):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95, subsampling=0)  # as the data set stores it
    return pixels(Image.open(data))


def as_generated(image, index):
    blurred = pixels(image.filter(ImageFilter.GaussianBlur(0.6)))
    noise = np.random.default_rng(index).normal(0, 0.03, blurred.shape)
    return (blurred + noise).clip(0, 1).astype(np.float32)


def verdict(scene):
    objects = detect(pixels(render(scene)))
    return lenient(objects, scene.metadata), strict(objects, scene.metadata)


@pytest.mark.parametrize(
    "seen", [lambda image, _: pixels(image), as_jpeg, as_generated], ids=["png", "jpeg", "noise"]
)
def test_the_judge_agrees_with_the_truth_on_99_of_100_scenes_of_every_kind(seen):
    right = dict.fromkeys(TASKS, 0)
    for index in range(SCENES):
        scene = scene_at(99, index)
        objects = detect(seen(render(scene), index))
        good = lenient(objects, scene.metadata) and strict(objects, scene.metadata)
        right[scene.metadata["tag"]] += good and graded(objects, scene.metadata) == 1
    assert min(right.values()) >= 0.99 * SCENES / len(TASKS), right


def test_the_detector_agrees_with_the_labels_of_190_of_200_imperfect_images():
    right = dict.fromkeys(FLAWS, 0)
    for flaw in FLAWS:
        for index in range(40):
            image = imperfect(flaw, index)
            seen = [(kind, d["color"]) for kind, found in detect(image.pixels).items() for d in found]
            right[flaw] += Counter(seen) == Counter((t.kind, t.color) for t in image.things)
    assert sum(right.values()) >= 190, right
    assert min(right.values()) >= 32, right


def test_two_nearly_equal_squares_of_a_model_score_alike():
    files = sorted((Path(__file__).parent / "squares").glob("*.png"))
    scores = Shapes().load(torch.device("cpu"))
    task = {"prompt": "a photo of a square", "include": [{"class": "square", "count": 1}]}
    images = torch.tensor(np.stack([pixels(Image.open(file)) for file in files]))
    assert scores(images, [task["prompt"]] * 2, [task] * 2).value.tolist() == [1.0, 1.0]
    assert all(detect(image)["square"][0]["color"] == "blue" for image in images.numpy())


def of_kind(*tags, count=60):
    scenes = (scene_at(7, index) for index in range(100 * count))
    return [s for s, _ in zip((s for s in scenes if s.metadata["tag"] in tags), range(count), strict=False)]


def test_a_scene_of_another_colour_is_wrong():
    for scene in of_kind("colors", "color_attr"):
        thing = scene.things[0]
        other = next(c for c in COLORS if c != thing.color)
        wrong = replace(scene, things=(replace(thing, color=other), *scene.things[1:]))
        assert verdict(scene) == (True, True)
        assert verdict(wrong) == (False, False), scene.metadata["prompt"]


def test_a_scene_that_lacks_an_object_is_wrong():
    for scene in of_kind(*TASKS):
        wrong = replace(scene, things=scene.things[1:])
        assert verdict(wrong) == (False, False), scene.metadata["prompt"]


def test_a_scene_with_one_object_too_many_is_wrong_for_counting_and_strictly_wrong_for_a_single_object():
    for scene in of_kind("counting", "single_object"):
        thing = scene.things[0]
        places = [(x, y) for x in (13, 32, 51) for y in (13, 32, 51)]
        free = [p for p in places if all(max(abs(p[0] - t.x), abs(p[1] - t.y)) > 20 for t in scene.things)]
        if free:
            more = replace(thing, x=free[0][0], y=free[0][1], size=14)
            wrong = replace(scene, things=(*scene.things, more))
            assert verdict(wrong) == (scene.metadata["tag"] == "single_object", False), scene.metadata[
                "prompt"
            ]


def test_a_scene_whose_objects_changed_places_is_wrong():
    for scene in of_kind("position"):
        a, b = scene.things
        wrong = replace(scene, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))
        assert verdict(wrong) == (False, False), scene.metadata["prompt"]


def test_a_malformed_blob_is_no_object():
    def found(draw_on):
        image = Image.new("RGB", (SIZE, SIZE), (240, 240, 240))
        draw_on(ImageDraw.Draw(image))
        return detect(pixels(image))

    red = (214, 48, 49)
    assert not found(lambda d: None)
    assert not found(lambda d: d.line([(10, 10), (50, 50)], fill=red, width=3))
    assert not found(
        lambda d: [d.rectangle([20, 10, 26, 50], fill=red), d.rectangle([10, 44, 50, 50], fill=red)]
    )
    assert [*found(lambda d: d.ellipse([20, 20, 40, 40], fill=red))] == ["circle"]


@pytest.mark.parametrize("style", STYLES)
def test_things_keep_apart_and_inside_the_image(style):
    for index in range(300):
        things = scene_at(3, index, style).things
        for i, a in enumerate(things):
            assert min(a.x, a.y, SIZE - a.x, SIZE - a.y) >= a.size / 2 + GAP
            for b in things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + GAP


def test_captions_are_the_prompts_of_clean_scenes_and_flawed_in_a_fifth_of_web_scenes():
    clean, web = ([scene_at(5, i, style) for i in range(600)] for style in ("clean", "web"))
    assert all(scene.caption == scene.metadata["prompt"] for scene in clean)
    assert 0.14 < sum(s.caption != s.metadata["prompt"] for s in web) / len(web) < 0.27
    for scene in clean + web:
        for text in (scene.caption, scene.metadata["prompt"]):
            assert set(text.split()) <= set(VOCABULARY)
            assert len(text.split()) <= 12


def test_metadata_has_the_form_of_geneval():
    for index in range(300):
        row = scene_at(1, index).metadata
        counting = row["tag"] == "counting"
        assert list(row) == ["tag", "include", *(["exclude"] if counting else []), "prompt"]
        if counting:
            (clause,) = row["include"]
            assert row["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]
        if row["tag"] == "position":
            target, placed = row["include"]
            relation, index_of_target = placed["position"]
            assert relation in RELATIONS
            assert index_of_target == 0
            assert row["prompt"] == f"a photo of a {placed['class']} {relation} a {target['class']}"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_data_set_is_in_the_published_format_and_a_function_of_its_settings(tmp_path):
    build(tmp_path / "a", 24, 4, "web")
    build(tmp_path / "b", 24, 4, "web")
    build(tmp_path / "longer", 30, 4, "web")
    build(tmp_path / "other", 24, 5, "web")
    a = contents(tmp_path / "a")
    assert a == contents(tmp_path / "b")
    rows = [json.loads(line) for line in a["train.jsonl"].splitlines()]
    metadata = [json.loads(line) for line in a["metadata.jsonl"].splitlines()]
    assert len(rows) == len(metadata) == 24
    for index, (row, truth) in enumerate(zip(rows, metadata, strict=True)):
        data = a[f"images/{row['md5']}.jpg"]
        assert hashlib.md5(data).hexdigest() == row["md5"]
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "JPEG")
        scene = scene_at(4, index, "web")
        assert row == {"md5": row["md5"], "caption_en": scene.caption, "bw": 64, "bh": 64}
        assert truth == scene.metadata
    assert contents(tmp_path / "longer")["train.jsonl"].startswith(a["train.jsonl"])
    assert contents(tmp_path / "other")["train.jsonl"] != a["train.jsonl"]


def test_several_processes_render_the_same_data_set(tmp_path, monkeypatch):
    build(tmp_path / "alone", 12, 4, "web")
    monkeypatch.setattr(dataset, "MANY", 12)
    monkeypatch.setattr(dataset, "CHUNK", 5)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", functools.partial(dataset.ProcessPoolExecutor, 2))
    build(tmp_path / "together", 12, 4, "web")
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_a_finished_data_set_stays_and_another_is_refused(tmp_path, monkeypatch):
    build(tmp_path / "a", 6, 0)
    monkeypatch.setattr(dataset, "render", None)  # rendering again would fail
    build(tmp_path / "a", 6, 0)
    before = contents(tmp_path / "a")
    with pytest.raises(DataError, match=r"another Shapes data set .*'images': 6"):
        build(tmp_path / "a", 7, 0)
    assert contents(tmp_path / "a") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="something else"):
        build(tmp_path / "mine", 6, 0)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}


def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(tmp_path, monkeypatch):
    whole, calls = dataset.render, []

    def until_full(scene):
        calls.append(scene)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return whole(scene)

    monkeypatch.setattr(dataset, "render", until_full)
    with pytest.raises(PosttrainError, match=r"data/a': the disk is full"):
        build(tmp_path / "data" / "a", 6, 0)
    assert not contents(tmp_path)
    assert not (tmp_path / "data" / "a").exists()


def test_evaluation_prompts_are_balanced_and_repeat_only_when_used_up():
    rows = evaluation_prompts(120, 0)
    assert rows == evaluation_prompts(120, 0) != evaluation_prompts(120, 1)
    available = dict(zip(TASKS, (3, 6, 9, 12, 24, 72), strict=True))
    for tag, distinct in available.items():
        prompts = [row["prompt"] for row in rows if row["tag"] == tag]
        assert len(prompts) == 20
        assert len(set(prompts)) == min(distinct, 20)
    some = prompt_rows(ShapesPrompts(count=8, tasks=["colors", "counting"]))
    assert [row["tag"] for row in some] == ["colors", "counting"] * 4
    with pytest.raises(ValueError, match="colors is given twice"):
        ShapesPrompts(count=8, tasks=["colors", "colors"])


def test_the_reward_gives_the_rules_verdicts_and_refuses_a_prompt_without_metadata():
    scenes = [scene_at(2, index) for index in range(12)]
    images = torch.tensor(np.stack([pixels(render(s)) for s in scenes]))
    rows = [s.metadata for s in scenes]
    for kind in ("graded", "lenient", "strict"):
        score = checked("shapes", Shapes(score=kind).load(torch.device("cpu")))
        prompts = [row["prompt"] for row in rows]
        assert score(images, prompts, rows).value.tolist() == [1.0] * 12
        empty = score(torch.full_like(images, 0.95), prompts, rows)
        assert empty.value.tolist() == [0.0] * 12
        assert {kind, *empty.details} == {"graded", "lenient", "strict"}
        with pytest.raises(RewardError, match="a photo of a dog"):
            score(images[:1], ["a photo of a dog"], [{"prompt": "a photo of a dog"}])


@pytest.mark.parametrize(("kind", "value"), [("graded", 0.0), ("lenient", 1.0), ("strict", 0.0)])
def test_score_picks_the_verdict_that_is_the_value(kind, value):
    scene = next(s for s in of_kind("single_object"))
    places = ((14, 14), (46, 14), (30, 46))
    three = replace(scene, things=tuple(replace(scene.things[0], x=x, y=y, size=16) for x, y in places))
    images = torch.tensor(pixels(render(three)))[None]
    scores = Shapes(score=kind).load(torch.device("cpu"))(
        images, [scene.metadata["prompt"]], [scene.metadata]
    )
    assert scores.value.tolist() == [value]
