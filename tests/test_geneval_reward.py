"""GenEval reads a detector's masks, cuts objects out, and judges them by the published rules."""

import io
import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from runs import HEAD
from tiny_clip import tiny_clip

from posttrain.data.prompts import read_prompts
from posttrain.errors import DataError, RecipeError, RewardError
from posttrain.planning.overview import overview
from posttrain.recipe.file import parse_recipe
from posttrain.rewards._colors import COLORS, colored, cut_out, load_colors
from posttrain.rewards._detector import CLASSES, instances, load_detector, named
from posttrain.rewards._geneval import lenient, strict
from posttrain.rewards._state import loaded
from posttrain.rewards.geneval import GenEval
from posttrain.rewards.shapes import Shapes
from posttrain.support.images import to_pil

CPU = torch.device("cpu")
NAMES = dict(enumerate(CLASSES))
LABELS = {
    "computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "motorcycle": "motorbike",
    "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant", "dining table": "diningtable",
    "tv": "tvmonitor",
}  # fmt: skip
"""GenEval's names -> those of a detector's label file of the older kind."""
BEAR, CAT, DOG = (CLASSES.index(name) for name in ("bear", "cat", "dog"))


def mask(x0, y0, x1, y1, size=64):
    whole = torch.zeros(size, size, dtype=torch.bool)
    whole[y0:y1, x0:x1] = True
    return whole


def task(*include, tag="two_object", **rest):
    return {"tag": tag, "prompt": "p", "include": list(include), **rest}


def test_boxes_are_those_of_the_masks_and_the_best_comes_first():
    masks = torch.stack([mask(3, 5, 20, 9), mask(30, 40, 64, 64), mask(0, 0, 1, 1), mask(0, 0, 0, 0)])
    found = named(
        masks, torch.tensor([0.5, 0.8, 0.2, 0.9]), torch.tensor([CAT, CAT, CAT, DOG]), NAMES, 0.3, 16
    )
    assert list(found) == ["cat"]
    assert [d["box"] for d in found["cat"]] == [[30, 40, 64, 64], [3, 5, 20, 9]]
    assert [d["score"] for d in found["cat"]] == pytest.approx([0.8, 0.5])
    assert found["cat"][1]["mask"].sum() == 17 * 4


def test_at_most_16_of_a_class_count_and_those_the_best():
    masks, scores = mask(0, 0, 8, 8).expand(20, -1, -1), torch.linspace(0.4, 0.9, 20)
    found = named(masks, scores, torch.full((20,), CAT), NAMES, 0.3, 16)
    assert len(found["cat"]) == 16
    assert found["cat"][0]["score"] == pytest.approx(0.9)
    assert found["cat"][-1]["score"] > 0.49


def test_instances_are_those_of_transformers():
    from types import SimpleNamespace

    from transformers import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    classes, masks = 2 * torch.randn(20, 6), torch.randn(20, 8, 8)
    output = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    expected = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0, return_binary_maps=True
    )[0]
    segments = expected["segments_info"]
    got_masks, scores, labels = instances(classes, masks, [(384, 384)], threshold=0)
    assert len(segments) == len(scores) == 20
    order = np.argsort([-s["score"] for s in segments])
    for i, j in zip(order, scores.argsort(descending=True), strict=True):
        assert segments[i]["score"] == pytest.approx(float(scores[j]), abs=1e-5)
        assert segments[i]["label_id"] == int(labels[j])
        assert torch.equal(expected["segmentation"][i].bool(), got_masks[j])
    surer = instances(classes, masks, [(384, 384)], threshold=0.3)
    assert 0 < len(surer[1]) < 20
    kept = scores > 0.3
    torch.testing.assert_close(surer[1][surer[1] > 0.3].sort()[0], scores[kept].sort()[0])
    assert instances(classes, masks, [(50, 40), (30, 20)], threshold=1)[0].shape == (0, 30, 20)


def test_a_left_dog_and_two_cats_are_judged_by_place_and_count():
    masks = torch.stack([mask(0, 20, 12, 40), mask(40, 20, 60, 40), mask(30, 50, 60, 64)])
    found = named(masks, torch.tensor([0.7, 0.8, 0.4]), torch.tensor([DOG, CAT, CAT]), NAMES, 0.3, 16)
    one, dog = {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}
    assert lenient(found, task(one, dog))  # the surer cat is looked at
    assert not strict(found, task(one, dog))
    assert not lenient(found, task(one, dog, exclude=[{"class": "cat", "count": 2}]))
    assert not lenient(found, task(one, {**dog, "position": ["right of", 0]}))
    assert strict(found, task({"class": "cat", "count": 2}))


@pytest.fixture
def painted():
    """A picture of a blue disc and a red bar, with what a detector would find."""
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 10, 29, 35), "blue")
    draw.rectangle((40, 20, 59, 29), "red")
    pixels = np.array(image)
    masks = torch.from_numpy(np.stack([(pixels == c).all(2) for c in ((0, 0, 255), (255, 0, 0))]))
    return image, named(masks, torch.tensor([0.9, 0.6]), torch.tensor([BEAR, BEAR]), NAMES, 0.3, 16)


def test_an_object_is_cut_out_on_grey(painted):
    image, found = painted
    disc, bar = (np.array(cut_out(image, d)) for d in found["bear"])
    assert disc.shape == (26, 26, 3)
    assert {tuple(c) for c in disc.reshape(-1, 3)} == {(0, 0, 255), (0x99, 0x99, 0x99)}
    assert tuple(disc[0, 0]) == (0x99,) * 3
    assert bar.shape == (10, 20, 3)
    assert (bar == (255, 0, 0)).all()


def nearest(crops, kind):
    """A classifier that needs no network: the colour of what is not grey."""
    known = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    means = [np.array(c).reshape(-1, 3)[~(np.array(c) == 0x99).all(2).ravel()].mean(0) for c in crops]
    return [min(known, key=lambda k: np.abs(m - known[k]).sum()) for m in means]


def test_colours_are_told_where_the_prompt_asks_for_them(painted):
    image, found = painted
    red = task({"class": "bear", "count": 1, "color": "red"})
    blue = task({"class": "bear", "count": 1, "color": "blue"})
    objects = colored(image, found, blue, nearest)
    assert [d["color"] for d in objects["bear"]] == ["blue", "red"]
    assert lenient(objects, blue)
    assert not lenient(objects, red)  # the surer bear is blue
    both = task({"class": "bear", "count": 2, "color": "red"})
    assert not strict(colored(image, found, both, nearest), both)
    assert "color" not in colored(image, found, task({"class": "bear", "count": 1}), nearest)["bear"][0]
    assert "color" not in found["bear"][0]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


class Sentences:
    """A CLIP whose features are random, longer and shorter, so that no step of the choice is idle."""

    image_size = 8

    def of_texts(self, texts):
        seeds = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return torch.stack([torch.randn(8, generator=g) * 9 * torch.rand(1, generator=g) for g in seeds])

    def of_images(self, pixels):
        return torch.randn(len(pixels), 8, generator=torch.Generator().manual_seed(len(pixels)))


def test_the_colour_is_that_whose_sentences_are_nearest():
    clip, crops = Sentences(), to_pil(torch.rand(60, 3, 9, 12))
    images, logits = clip.of_images(crops), torch.zeros(60, 10)
    for i, color in enumerate(COLORS):
        text = clip.of_texts(
            [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
        )
        mean = (text / text.norm(dim=1, keepdim=True)).mean(0)
        logits[:, i] = images @ mean / mean.norm()
    assert load_colors(clip)(crops, "cat") == [COLORS[i] for i in logits.argmax(1)]
    assert load_colors(clip)(crops, "dog") != [COLORS[i] for i in logits.argmax(1)]


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    return tiny_detector(tmp_path_factory.mktemp("detector"))


def tiny_detector(folder, names=CLASSES):
    """``folder`` with a random Mask2Former as transformers publishes them, loss and all."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former import modeling_mask2former

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        id2label={i: LABELS.get(name, name) for i, name in enumerate(names)},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)  # scipy, for training
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        # a random network is sure of nothing; this one prefers some classes
        model.class_predictor.weight.mul_(60)
    model.save_pretrained(folder)
    return folder


def test_the_reward_loads_published_layouts_and_judges(detector_folder, clip_folder):
    settings = {
        "detector": str(detector_folder),
        "clip": str(clip_folder),
        "shorter_side": 64,
        "longer_side": 96,
    }
    reward = GenEval(**settings, batch_size=2)
    assert reward.problem() is None
    torch.manual_seed(1)
    images = torch.rand(3, 3, 48, 48)
    detect = load_detector(detector_folder, (64, 96), 16, CPU)
    seen = detect(to_pil(images), [0.3] * 3)
    assert all(seen)  # or the scores below say nothing
    assert all(d["mask"].shape == (48, 48) for found in seen for ds in found.values() for d in ds)
    assert not any(detect(to_pil(images), [0.999] * 3))
    kind = next(iter(seen[0]))
    tasks = [task({"class": kind, "count": len(f.get(kind, ())) or 1}) for f in seen]
    tasks[2] = task({"class": kind, "count": 1, "color": "red"}, tag="counting")
    scores = reward.load(CPU)(images, ["p"] * 3, tasks)
    assert set(scores.details) == {"lenient", "strict"}
    assert scores.details["strict"][0] == scores.value[0] == 1
    assert bool(scores.value.isfinite().all())
    again = GenEval(**settings, batch_size=3, score="strict").load(CPU)(images, ["p"] * 3, tasks)
    assert torch.equal(again.details["graded"], scores.value)
    assert torch.equal(again.value, scores.details["strict"])
    waiting = GenEval(**settings, batch_size=2, offload=True).load(CPU)
    for _ in range(2):  # the second use finds the colours' directions kept from the first
        assert torch.equal(waiting(images, ["p"] * 3, tasks).value, scores.value)


def test_counting_asks_the_detector_to_be_surer(detector_folder, clip_folder):
    settings = {
        "detector": str(detector_folder),
        "clip": str(clip_folder),
        "shorter_side": 64,
        "longer_side": 96,
    }
    torch.manual_seed(1)
    images = torch.rand(1, 3, 48, 48)
    (seen,) = load_detector(detector_folder, (64, 96), 16, CPU)(to_pil(images), [0.3])
    kind, best = next((k, ds[0]["score"]) for k, ds in seen.items())
    reward = GenEval(**settings, counting_threshold=(best + 1) / 2).load(CPU)
    present = task({"class": kind, "count": 1})
    assert reward(images, ["p"], [present]).details["lenient"] == 1
    assert reward(images, ["p"], [present | {"tag": "counting"}]).details["lenient"] == 0


def test_the_detector_without_its_loss_is_transformers_own(detector_folder):
    from safetensors.torch import load_file
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former import modeling_mask2former

    from posttrain.rewards._mask2former import Segmenter

    assert any(name.startswith("criterion.") for name in load_file(detector_folder / "model.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
        whole = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, (classes, masks) = (
            whole(pixel_values=pixels),
            loaded(Segmenter, detector_folder, CPU)(pixels),
        )
    torch.testing.assert_close(classes, expected.class_queries_logits)
    torch.testing.assert_close(masks, expected.masks_queries_logits)


def test_weights_that_lack_a_layer_are_refused_not_made_up(detector_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(detector_folder, tmp_path / "lacking")
    file = tmp_path / "lacking" / "model.safetensors"
    state = load_file(file)
    del state["class_predictor.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"do not fit: 1 missing \(class_predictor\.bias\)"):
        load_detector(tmp_path / "lacking", (64, 96), 16, CPU)


def test_a_detector_that_lacks_classes_is_refused(tmp_path, clip_folder):
    names = [f"thing {i}" if name in ("bench", "tv") else name for i, name in enumerate(CLASSES)]
    folder = tiny_detector(tmp_path, names)
    with pytest.raises(RewardError, match="does not know 'bench', 'tv', so it cannot judge"):
        GenEval(detector=str(folder), clip=str(clip_folder)).load(CPU)


def test_prompts_that_cannot_be_judged_are_refused_by_line(tmp_path):
    rows = [
        task({"class": "cat", "count": 1}),
        {"prompt": "a cat"},
        task({"class": "sofa", "count": 1}),
        task({"class": "cat", "count": 1, "color": "gray"}),
        {k: v for k, v in task({"class": "cat", "count": 1}).items() if k != "tag"},
        task({"class": "cat", "count": 1}, exclude=[{"class": "diningtable", "count": 2}]),
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        read_prompts(file, [GenEval()])
    message = str(caught.value)
    assert "5 prompts cannot be used" in message
    for words in (
        "2: geneval: it has no GenEval metadata",
        "3: geneval: the detector knows no 'sofa'",
        "4: geneval: 'gray' is none of the colours red",
        "5: geneval: it has no 'tag'",
        "6: geneval: the detector knows no 'diningtable' (did you mean 'dining table'?)",
    ):
        assert words in message


ONLINE = """\
stages:
  - name: rl
    algorithm: {{type: flow_grpo, group_size: 2, num_steps: 4}}
    data: {{prompts: {prompts}, resolution: 16}}
    rewards: {{{reward}: 1.0}}
    train: {{steps: 1, batch_size: 4, steps_per_batch: 1, sample_every: null}}
"""


@pytest.mark.parametrize("reward", ["geneval", "clipscore", "hpsv2", "aesthetic", "imagereward"])
def test_a_recipe_with_the_reward_is_checked_without_its_weights(tmp_path, reward):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(task({"class": "cat", "count": 1})) + "\n")
    recipe = parse_recipe(HEAD + ONLINE.format(prompts=file, reward=reward), "r.yaml")
    assert [r.label for r in recipe.stages[0].rewards] == [reward]
    text = io.StringIO()
    Console(file=text, width=200).print(overview(recipe))
    assert f"posttrain rewards fetch {reward}" in text.getvalue()


def test_a_recipe_whose_prompts_geneval_cannot_judge_is_refused():
    with pytest.raises(RecipeError, match="the detector knows no 'circle'"):
        parse_recipe(HEAD + ONLINE.format(prompts="{type: shapes, count: 6}", reward="geneval"), "r.yaml")


CAT_CLAUSE = {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    "row",
    [
        task(),
        task("cat"),
        task({"class": "cat"}),
        task({"class": "cat", "count": 0}),
        task(CAT_CLAUSE, exclude=[{"count": 2}]),
        task(CAT_CLAUSE) | {"include": CAT_CLAUSE},
        task({**CAT_CLAUSE, "position": ["left of", 0]}),
        task(CAT_CLAUSE, {**CAT_CLAUSE, "position": ["near", 0]}),
        task(CAT_CLAUSE, {**CAT_CLAUSE, "position": ["left of", -1]}),
    ],
)
def test_metadata_that_no_rule_fits_are_refused_before_an_image_is_made(row):
    for reward in (GenEval(), Shapes()):
        assert reward.prompt_problem(row).startswith(f"{reward.type}: ")


def test_shapes_and_geneval_give_the_same_details():
    scene = task({"class": "circle", "count": 1})
    scores = Shapes(score="strict").load(CPU)(torch.ones(1, 3, 64, 64), ["p"], [scene])
    assert set(scores.details) == {"graded", "lenient"}
    assert scores.value.tolist() == [0]
