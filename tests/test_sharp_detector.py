"""What a detector's logits say is worked out by hand: scores, masks, boxes, limits and names."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import RewardError
from posttrain.rewards import _detector
from posttrain.rewards._detector import CLASSES, SPELLINGS, _names, instances, load_detector, named

NAMES = {0: "cat", 1: "dog"}


def logits(*probabilities):
    """(queries, labels + 1) whose softmax are the ``probabilities`` of the labels; the rest is of no object."""
    return torch.tensor([[*row, 1 - sum(row)] for row in probabilities]).log()


def flat(*values, size=2):
    """Masks (queries, size, size), each of one logit."""
    return torch.tensor(values).view(-1, 1, 1).expand(-1, size, size).clone()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_score_is_the_class_times_how_sure_the_mask_is():
    masks, scores, labels = instances(logits([0.5, 0.3], [0.1, 0.7]), flat(2.0, 1.0), [], 0.2)
    assert labels.tolist() == [1, 0], "as many as there are queries, the best first"
    assert scores.tolist() == pytest.approx([0.7 * sigmoid(1), 0.5 * sigmoid(2)], abs=1e-5)
    assert masks.dtype == torch.bool
    assert masks.all()
    assert masks.shape == (2, 2, 2)


def test_one_query_may_be_two_objects_and_another_none():
    masks, scores, labels = instances(logits([0.45, 0.44], [0.1, 0.2]), flat(3.0, -1.0), [], 0.0)
    assert labels.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([0.45 * sigmoid(3), 0.44 * sigmoid(3)], abs=1e-5)
    assert masks.all()


def test_the_surety_is_the_mean_inside_alone():
    mask = torch.tensor([[[2.0, -5.0], [1.0, 0.0]]])
    masks, scores, _ = instances(logits([0.8, 0.1]), mask, [], 0.0)
    assert masks.tolist() == [[[True, False], [True, False]]], "0 is outside"
    assert float(scores[0]) == pytest.approx(0.8 * (sigmoid(2) + sigmoid(1)) / 2, abs=1e-5)
    outside = instances(logits([0.8, 0.1]), flat(-1.0), [], 0.0)
    assert outside[1].tolist() == [0.0], "an empty mask scores nothing, and divides by none"


def test_what_is_not_above_the_least_is_left_out():
    half = torch.zeros(1, 2)  # of one label and none: exactly 0.5
    assert len(instances(half, flat(1.0), [], 0.5)[1]) == 0
    assert len(instances(half, flat(1.0), [], 0.499)[1]) == 1
    kept, scores, labels = instances(half, flat(1.0), [(3, 5), (4, 6)], 0.5)
    assert (tuple(kept.shape), tuple(scores.shape), tuple(labels.shape)) == ((0, 4, 6), (0,), (0,))


def test_scores_and_masks_that_are_left_belong_together():
    classes = torch.tensor([[9.0, 0.0], [0.0, 0.0], [8.0, 0.0]])
    masks, scores, labels = instances(classes, flat(1.0, 2.0, 3.0), [], 0.5)
    assert scores.tolist() == pytest.approx([sigmoid(9) * sigmoid(1), sigmoid(8) * sigmoid(3)], abs=1e-5)
    assert (len(masks), labels.tolist()) == (2, [0, 0])


def test_the_mean_inside_is_over_a_millionth_of_a_pixel_more():
    sure = torch.full((1, 1, 1), 99.0)  # one pixel, of certainty 1
    score = float(instances(torch.zeros(1, 2), sure, [], 0.4)[1][0])
    assert 0.499999 < score < 0.4999997


def test_fewer_scores_than_queries_are_all():
    assert len(instances(torch.zeros(3, 2), flat(1.0, 1.0, 1.0), [], 0.1)[1]) == 3


def test_masks_are_resized_one_size_after_the_other():
    mask = torch.tensor([[[3.0, -1.0], [3.0, -1.0]]])
    once = instances(logits([0.8, 0.1]), mask, [(4, 4)], 0.0)
    # bilinear, by the pixels' middles: 3, 2, 0, -1
    assert once[0][0].tolist() == [[True, True, False, False]] * 4
    assert float(once[1][0]) == pytest.approx(0.8 * (sigmoid(3) + sigmoid(2)) / 2, abs=1e-5)
    torch.manual_seed(0)
    masks, classes = torch.randn(3, 3, 4), torch.randn(3, 4)
    got = instances(classes, masks, [(7, 5), (6, 9)], 0.0)
    larger = masks
    for size in ((7, 5), (6, 9)):
        larger = torch.nn.functional.interpolate(larger[:, None], size, mode="bilinear")[:, 0]
    probabilities = classes.softmax(1)[:, :3].flatten()
    for i, place in enumerate(probabilities.argsort(descending=True)[:3].tolist()):
        inside = larger[place // 3] > 0
        expected = probabilities[place] * larger[place // 3][inside].sigmoid().mean()
        assert torch.equal(got[0][i], inside)
        assert float(got[1][i]) == pytest.approx(float(expected), abs=1e-5)
        assert int(got[2][i]) == place % 3
    same = instances(classes, masks, [(3, 4)], 0.0)
    assert torch.equal(same[0], masks[[int(p) // 3 for p in probabilities.argsort(descending=True)[:3]]] > 0)


def boxed(x0, y0, x1, y1, height=6, width=8):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_boxes_hold_the_whole_mask_and_the_best_come_first():
    masks = torch.stack(
        [boxed(1, 2, 4, 3), boxed(0, 0, 8, 6), boxed(7, 5, 8, 6), boxed(2, 2, 3, 3) | boxed(5, 4, 6, 5)]
    )
    found = named(masks, torch.tensor([0.5, 0.6, 0.6, 0.9]), torch.tensor([0, 0, 0, 1]), NAMES, 0.3, 9)
    assert list(found) == ["dog", "cat"]
    assert [d["box"] for d in found["cat"]] == [[0, 0, 8, 6], [7, 5, 8, 6], [1, 2, 4, 3]], (
        "equals keep their order"
    )
    assert found["dog"][0]["box"] == [2, 2, 6, 5]
    assert [d["score"] for d in found["cat"]] == pytest.approx([0.6, 0.6, 0.5])
    assert all(type(v) is float for d in found["cat"] for v in (*d["box"], d["score"]))
    np.testing.assert_array_equal(found["cat"][2]["mask"], boxed(1, 2, 4, 3).numpy())


def test_only_so_many_of_a_class_above_the_least_with_a_mask_count():
    masks = torch.stack(
        [boxed(0, 0, 1, 1), boxed(1, 1, 2, 2), boxed(2, 2, 3, 3), boxed(0, 0, 0, 0), boxed(3, 3, 4, 4)]
    )
    scores, labels = torch.tensor([0.5, 0.75, 0.875, 0.9, 0.25]), torch.tensor([0, 0, 0, 0, 1])
    assert [d["box"][0] for d in named(masks, scores, labels, NAMES, 0.2, 2)["cat"]] == [2, 1]
    assert [d["box"][0] for d in named(masks, scores, labels, NAMES, 0.5, 9)["cat"]] == [2, 1], (
        "0.5 is not above 0.5"
    )
    assert list(named(masks, scores, labels, NAMES, 0.25, 9)) == ["cat"], "a class with nothing left is none"
    assert named(masks[:0], scores[:0], labels[:0], NAMES, 0.2, 2) == {}


def test_spellings_of_label_files_become_genevals_names():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert set(SPELLINGS.values()) <= set(CLASSES)
    assert not set(SPELLINGS) & set(CLASSES)
    assert SPELLINGS == {
        "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
        "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv",
    }  # fmt: skip
    back = {new: old for old, new in SPELLINGS.items()}
    labels = {i: back.get(name, name) for i, name in enumerate(CLASSES)}
    assert _names(labels | {80: "extra"}, Path("x")) == dict(enumerate([*CLASSES, "extra"]))


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (1, "'person'"),
        (3, "'person', 'bicycle', 'car'"),
        (4, "'person', 'bicycle', 'car' and 1 more"),
        (6, "'person', 'bicycle', 'car' and 3 more"),
    ],
)
def test_a_detector_that_lacks_classes_is_refused_by_the_first_three(lacking, words):
    with pytest.raises(RewardError) as caught:
        _names(dict(enumerate(CLASSES[lacking:])), Path("folder"))
    assert str(caught.value) == f"the detector in 'folder' does not know {words}, so it cannot judge GenEval"


def test_a_detector_answers_for_each_image_at_its_own_size(monkeypatch):
    """Each image has a cat on its left half, of class score 0.7, and one below it."""
    seen, asked, cat = [], [], CLASSES.index("cat")

    def model(pixels):
        seen.append((tuple(pixels.shape), torch.is_grad_enabled()))
        classes = torch.full((len(pixels), 2, len(CLASSES) + 1), -20.0)
        classes[:, :, cat], classes[:, :, -1] = torch.tensor([0.7, 0.6]).log(), torch.tensor([0.3, 0.4]).log()
        masks = torch.full((len(pixels), 2, 4, 6), -9.0)
        masks[..., :3] = 9.0
        return classes, masks

    def load(*arguments):
        asked.append(arguments)
        return model

    model.config = SimpleNamespace(id2label=dict(enumerate(CLASSES)))
    monkeypatch.setattr(_detector, "loaded", load)
    folder, device = Path("folder"), torch.device("cpu")
    detect = load_detector(folder, (64, 100), 1, device)
    pictures = [Image.new("RGB", (60, 20), color) for color in ("red", "blue")]
    first, second = detect(pictures, [0.3, 0.75])
    assert [(kind.__name__, *rest) for kind, *rest in asked] == [("Segmenter", folder, device)]
    # 60 x 20 to 100 x 33, in steps of 32
    assert seen == [((2, 3, 64, 128), False)]
    assert (list(first), second) == (["cat"], {})
    (found,) = first["cat"]
    assert found["mask"].shape == (20, 60)
    assert found["box"] == [0, 0, 30, 20]
    assert len(load_detector(folder, (64, 100), 2, device)(pictures[:1], [0.3])[0]["cat"]) == 2
    square = Image.new("RGB", (40, 40))
    detect([square], [0.3])
    assert seen[-1][0] == (1, 3, 64, 64), "40 x 40 to 64 x 64"
    with pytest.raises(ValueError, match=r"longer|shorter"):
        detect(pictures, [0.3])
