"""Preprocessing, cut-outs and colours of published scorers, on images of a few pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.rewards import _colors
from posttrain.rewards._colors import BACKGROUND, COLORS, TEMPLATES, colored, cut_out, load_colors
from posttrain.rewards._pixels import (
    MEAN,
    STD,
    _middle,
    _shorter_to,
    by_longer_side,
    by_shorter_side,
    normalised,
    of_pil,
)
from posttrain.support.images import to_pil


def undone(images):
    """What :func:`normalised` was given."""
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_the_published_constants():
    assert MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert STD == (0.26862954, 0.26130258, 0.27577711)
    assert COLORS == ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    assert TEMPLATES == (
        "a photo of a {color} {kind}",
        "a photo of a {color}-colored {kind}",
        "a photo of a {color} object",
    )
    assert BACKGROUND == "#999"


def test_each_channel_is_normalised_by_its_own_numbers():
    got = normalised(torch.ones(2, 3, 1, 2))
    expected = (
        torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])
        .view(1, 3, 1, 1)
        .expand(2, 3, 1, 2)
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(undone(got), torch.ones(2, 3, 1, 2))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 10, (7, 7)),
        (10, 19, (7, 13)),
        (19, 10, (13, 7)),
        (10, 11, (7, 7)),
        (5, 100, (7, 140)),
        (100, 5, (140, 7)),
    ],
)
def test_the_longer_side_is_cut_off_not_rounded(height, width, expected):
    assert _shorter_to(7, height, width) == expected  # 7 x 19 / 10 is 13.3, 7 x 11 / 10 is 7.7


def test_the_middle_is_rounded_to_even():
    image = torch.arange(49).view(1, 7, 7)
    assert torch.equal(_middle(image, 4), image[:, 2:6, 2:6])  # 1.5 goes to 2
    assert torch.equal(_middle(image[:, :6, :5], 4), image[:, 1:5, 0:4])  # 0.5 goes to 0


def halves(height, width, across):
    """0.25 in the first half and 0.75 in the second."""
    image = torch.full((1, 3, height, width), 0.25)
    (image[..., width // 2 :] if across else image[..., height // 2 :, :]).fill_(0.75)
    return image


@pytest.mark.parametrize("across", [True, False])
def test_by_the_shorter_side_keeps_the_middle_square(across):
    image = halves(4, 8, True) if across else halves(8, 4, False)
    got = undone(by_shorter_side(image.double(), 4))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, halves(4, 4, across))


def test_by_the_shorter_side_averages_where_it_shrinks_and_blends_where_it_grows():
    image = torch.zeros(1, 3, 4, 4)
    image[..., ::2] = 1.0
    shrunk = undone(by_shorter_side(image, 2))
    assert shrunk[0, 0, 0].tolist() == pytest.approx([4 / 7, 3 / 7], abs=1e-6)  # weights 3, 3, 1 of 7
    grown = undone(by_shorter_side(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 3, 2, 2), 4))
    assert grown[0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "size", "rows", "columns"),
    [
        (8, 4, 8, (0, 8), (2, 6)),
        (4, 8, 8, (2, 6), (0, 8)),
        (3, 8, 8, (2, 5), (0, 8)),
        (16, 10, 8, (0, 8), (1, 6)),
        (2, 1, 4, (0, 4), (1, 3)),
    ],
)
def test_by_the_longer_side_pads_with_black(height, width, size, rows, columns):
    got = undone(by_longer_side(torch.full((1, 3, height, width), 0.5, dtype=torch.float64), size))
    expected = torch.zeros(1, 3, size, size)
    expected[..., slice(*rows), slice(*columns)] = 0.5
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_by_the_longer_side_is_bicubic_and_overshoots():
    step = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    grown = undone(by_longer_side(step, 8))[0, 0, 4]
    assert float(grown.max()) > 1.01
    assert float(grown.min()) < -0.01
    shrunk = undone(by_longer_side(torch.eye(8).expand(1, 3, 8, 8), 4))[0, 0]
    channel = Image.fromarray(np.eye(8, dtype=np.float32), "F").resize((4, 4), Image.Resampling.BICUBIC)
    torch.testing.assert_close(shrunk, torch.from_numpy(np.array(channel)), atol=1e-5, rtol=0)


def test_8_bit_images_are_resized_one_by_one():
    random = np.random.default_rng(0)
    wide, high = (
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in ((6, 10, 3), (11, 5, 3))
    )
    got = undone(of_pil([wide, high], 4)) * 255
    expected = [
        np.array(wide.resize((6, 4), Image.Resampling.BICUBIC))[:, 1:5],
        np.array(high.resize((4, 8), Image.Resampling.BICUBIC))[2:6],
    ]
    np.testing.assert_allclose(got.numpy(), np.stack(expected).transpose(0, 3, 1, 2), atol=1e-3)
    grey = of_pil([Image.new("L", (4, 4), 51)], 4)
    torch.testing.assert_close(undone(grey), torch.full((1, 3, 4, 4), 0.2))


class Directions:
    """A CLIP whose text features are given, and whose image features are the mean colour of the cut-outs."""

    image_size = 4

    def __init__(self, features):
        self.features, self.asked, self.gradients = features, [], []

    def of_texts(self, texts):
        self.asked.append(texts)
        self.gradients.append(torch.is_grad_enabled())
        return torch.tensor([self.features[text] for text in texts])

    def of_images(self, pixels):
        assert pixels.shape[1:] == (3, 4, 4)
        self.gradients.append(torch.is_grad_enabled())
        return undone(pixels).mean((2, 3))


def test_the_colour_is_that_of_the_nearest_mean_of_sentences():
    features = {t.format(color=c, kind="cat"): [0.0, 0.0, -1.0] for c in COLORS for t in TEMPLATES}
    # unit vectors count: (2 of 3 red) against (one long blue); without normalising the mean, green would win
    red, blue, green = ([features.__setitem__(t.format(color=c, kind="cat"), v) for t, v in zip(TEMPLATES, vs, strict=True)] for c, vs in (
        ("red", ([9.0, 0, 0], [1.0, 0, 0], [0, 0, 0.1])), ("blue", ([0, 0, 9.0], [0, 0, 1.0], [0, 0, 5.0])), ("green", ([0, 1.0, 0], [0, 0, -1.0], [0, 1.0, 0])),
    ))  # fmt: skip
    assert [*map(len, (red, blue, green))] == [3, 3, 3]
    clip = Directions(features)
    classify = load_colors(clip)
    crops = [Image.new("RGB", (5, 6), color) for color in ("#ff0000", "#0000ff", "#00ff00", "#804000")]
    assert classify(crops, "cat") == ["red", "blue", "green", "red"]
    assert classify(crops[:1], "cat") == ["red"]
    assert clip.asked == [[t.format(color=c, kind="cat") for t in TEMPLATES] for c in COLORS], (
        "once for a class"
    )
    assert not any(clip.gradients)


def test_the_mean_of_sentences_is_normalised_itself():
    # blue's sentences disagree, so their mean is short: only its direction counts
    features = {t.format(color=c, kind="x"): [-1.0, 0.0, 0.0] for c in COLORS for t in TEMPLATES}
    features |= {
        t.format(color="blue", kind="x"): v
        for t, v in zip(TEMPLATES, ([0, 1.0, 0], [0, -0.9, 0.1], [0, 0, 1.0]), strict=True)
    }
    features |= {t.format(color="red", kind="x"): [0.0, 5.0, 8.0] for t in TEMPLATES}
    directions = {
        c: torch.tensor([features[t.format(color=c, kind="x")] for t in TEMPLATES]) for c in ("red", "blue")
    }
    means = {c: torch.nn.functional.normalize(d).mean(0) for c, d in directions.items()}
    assert means["blue"][2] < means["red"][2] < 1, "not by length"
    assert load_colors(Directions(features))([Image.new("RGB", (4, 4), "#0000ff")], "x") == ["blue"]


def detection(box, mask):
    return {"box": box, "score": 0.5, "mask": np.array(mask, bool)}


def test_an_object_is_cut_out_of_its_box_on_grey():
    image = to_pil(torch.arange(3 * 4 * 5).view(1, 3, 4, 5) / 255)[0]
    mask = np.zeros((4, 5))
    mask[1:3, 2:4] = 1
    mask[1, 2] = 0
    got = np.array(cut_out(image, detection([2.9, 1.2, 4.9, 3.0], mask)))
    expected = np.array(image)[1:3, 2:4].copy()
    expected[0, 0] = 153
    np.testing.assert_array_equal(got, expected)


def test_only_classes_whose_colour_is_asked_are_coloured(monkeypatch):
    image = Image.new("RGB", (4, 4))
    monkeypatch.setattr(_colors, "cut_out", lambda picture, d: (picture is image, d["box"]))
    found = {"cat": [{"box": 1}, {"box": 2}], "dog": [{"box": 3}], "cow": [{"box": 4}]}
    asked = []

    def classify(crops, kind):
        asked.append((crops, kind))
        return [f"{kind} {i}" for i in range(len(crops))]

    task = {
        "include": [{"class": "cat", "color": "red"}, {"class": "dog"}, {"class": "bird", "color": "red"}]
    }
    got = colored(image, found, task, classify)
    assert got == {
        "cat": [{"box": 1, "color": "cat 0"}, {"box": 2, "color": "cat 1"}],
        "dog": [{"box": 3}],
        "cow": [{"box": 4}],
    }
    assert asked == [([(True, 1), (True, 2)], "cat")]
    assert found["cat"] == [{"box": 1}, {"box": 2}], "what was found is left as it was"
    with pytest.raises(ValueError, match="zip"):
        colored(image, found, task, lambda crops, kind: ["red"])
