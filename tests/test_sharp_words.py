"""Rewards without a network, by hand: OCR's distance, JPEG sizes, a function of one's own."""

import hashlib
import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from posttrain.errors import RewardError
from posttrain.rewards.callable import Callable
from posttrain.rewards.jpeg import JpegCompressibility, JpegIncompressibility, kilobytes
from posttrain.rewards.ocr import OCR, normalised, quoted, similarity

CPU = torch.device("cpu")
INFINITY = float("inf")


@pytest.mark.parametrize(
    ("target", "read", "score"),
    [
        ("STOP", "stop", 1), ("S TOP", "the s t o p sign", 1), ("stop", "", 0), ("stop", "stap", 0.75), ("stop", "sto", 0.75),
        ("abcd", "abcdx"[1:], 0.5), ("ab", "xyzuvw", 0), ("a b", "ax", 0.5), ("abcde", "vwxyz", 0), ("kitten", "sitting", 0.5),
    ],
)  # fmt: skip
def test_the_ocr_score_by_hand(target, read, score):
    assert similarity(target, read) == pytest.approx(score)


@given(st.text("ab ", min_size=1, max_size=6).filter(str.strip), st.text("ab ", max_size=9))
def test_the_ocr_score_is_1_less_the_edit_distance_over_the_length(target, read):
    a, b = target.replace(" ", ""), read.replace(" ", "")
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[j - 1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    distance = 0 if a in b else row[-1]
    assert similarity(target, read) == pytest.approx(1 - min(distance, len(a)) / len(a))


def test_the_text_to_be_read_is_between_the_first_two_quotes():
    assert [quoted(p) for p in ('a "b" c', '"b" and "d"', 'a "b', "a b", '""')] == ["b", "b", None, None, ""]
    assert normalised(" A bC ") == normalised("A\nb\tC") == "abc"
    assert OCR().prompt_problem({"prompt": 'a "b"'}) is None
    assert (
        OCR().prompt_problem({"prompt": "a b"})
        == 'ocr: there is no text between double quotes ("...") to be read'
    )
    assert OCR().prompt_problem({"prompt": 'a " "'}) == "ocr: the text between the double quotes is empty"
    assert (OCR.range, OCR.requires) == ((0.0, 1.0), ("rapidocr", "onnxruntime", "rapidfuzz"))


def test_what_ocr_reads_is_joined_and_compared_image_by_image(monkeypatch):
    made, calls, replies = [], [], [("ST", "OP"), None, ("no",), ("b",)]

    class Reader:
        def __init__(self, params):
            made.append(params)

        def __call__(self, image, **how):
            calls.append((image.getpixel((0, 0)), how))
            return SimpleNamespace(txts=replies.pop(0))

    monkeypatch.setitem(sys.modules, "rapidocr", SimpleNamespace(RapidOCR=Reader))
    score = OCR().load(CPU)
    images = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert score(images, ['a "stop"', 'a "x"', 'a "na"'], [{}] * 3).value.tolist() == [1.0, 0.0, 0.5]
    assert made == [
        {
            "Global.log_level": "error", "Global.use_cls": False, "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "Det.limit_side_len": 128, "Det.limit_type": "min",
        }
    ]  # fmt: skip
    how = {"use_det": True, "use_cls": False, "use_rec": True}
    assert calls == [((0, 0, 0), how), ((51, 51, 51), how), ((255, 255, 255), how)]
    with pytest.raises(ValueError, match=r"^no text between double quotes in 'b'"):
        score(images[:1], ["b"], [{}])
    with pytest.raises(ValueError, match="argument 2"):
        score(images[:1], ['"b"'] * 2, [{}])


def test_jpeg_sizes_are_thousands_of_bytes_at_quality_95():
    images = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    images[1] = 0.25
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(
            file, "JPEG", quality=95
        )
        sizes.append(len(file.getvalue()) / 1000)
    assert kilobytes(images).tolist() == pytest.approx(sizes)
    assert JpegIncompressibility().load(CPU)(images, [""] * 2, [{}] * 2).value.tolist() == pytest.approx(
        sizes
    )
    smaller = JpegCompressibility().load(CPU)(images, [""] * 2, [{}] * 2).value
    assert smaller.tolist() == pytest.approx([-size / 500 for size in sizes])
    assert (JpegIncompressibility.range, JpegCompressibility.range) == ((0.0, INFINITY), (-INFINITY, 0.0))


def test_a_function_of_ones_own_gets_everything_and_may_return_any_numbers(monkeypatch, tmp_path):
    (tmp_path / "sharp_own.py").write_text(
        "import numpy\ndef taste(images, prompts, metadata):\n    return numpy.array([len(p) + m['n'] + float(i.sum()) for i, p, m in zip(images, prompts, metadata)])\n"
    )
    (tmp_path / "sharp_bad.py").write_text("1 / 0\n")
    for name in ("sharp_own", "sharp_bad"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    reward = Callable(function="sharp_own:taste")
    assert (reward.problem(), reward.label, Callable.range) == (None, "taste", (-INFINITY, INFINITY))
    assert sys.path[-1] == str(tmp_path)
    got = reward.load(CPU)(torch.ones(2, 3, 1, 1), ["a", "bc"], [{"n": 0.5}, {"n": 1}])
    assert got.value.tolist() == [4.5, 6.0]
    assert got.value.dtype == torch.float32
    assert sys.path.count(str(tmp_path)) == 1
    for name in ("sharp_none:f", "sharp_none.deep:f"):
        words = f"no module {name.partition(':')[0]!r}, neither installed nor in the folder {tmp_path}"
        assert Callable(function=name).problem() == words
    with pytest.raises(
        RewardError,
        match=r"^cannot load the reward 'sharp_bad:f': ZeroDivisionError: division by zero \(.*sharp_bad\.py, line 1\)$",
    ):
        Callable(function="sharp_bad:f").load(CPU)
    with pytest.raises(RewardError, match=r"^cannot load the reward 'sharp_own:other': .*has no 'other'"):
        Callable(function="sharp_own:other").load(CPU)
    for wrong in ("f", "m:", ":f", "m:f.g", "1m:f", "m:1f"):
        with pytest.raises(ValueError, match=r"pattern|has not the form"):
            Callable(function=wrong)


def test_what_is_no_function_is_refused(monkeypatch, tmp_path):
    text = "from posttrain.reward import Reward\nfive = 5\nclass Own(Reward):\n    pass\nclass Plain:\n    pass\n"
    (tmp_path / "sharp_kinds.py").write_text(text)
    monkeypatch.delitem(sys.modules, "sharp_kinds", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    own = "'sharp_kinds:Own' is a class of rewards, no function: write rewards: [{type: 'sharp_kinds:Own'}]"
    with pytest.raises(RewardError, match=f"^{re.escape(own)}$"):
        Callable(function="sharp_kinds:Own").load(CPU)
    assert Callable(function="sharp_kinds:Own").problem() == own
    assert Callable(function="sharp_kinds:Plain").load(CPU) is not None, (
        "a class of another kind can be called"
    )
    with pytest.raises(RewardError, match=r"^'sharp_kinds:five' is int, no function$"):
        Callable(function="sharp_kinds:five").load(CPU)


def test_the_source_of_a_function_is_the_module_named_and_the_one_that_defines_it(monkeypatch, tmp_path):
    texts = {
        "sharp_first": "from sharp_second import taste\nfrom sys import exit\n",
        "sharp_second": "taste = lambda *_: [1]\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    reward = Callable(function="sharp_first:taste")
    assert reward.source_files() == {name: tmp_path / f"{name}.py" for name in texts}
    assert reward.hashes() == {
        "source": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    }
    assert [*Callable(function="sharp_first:exit").source_files()] == ["sharp_first"], "sys has no file"


def test_a_function_is_found_in_the_current_folder_when_it_is_loaded_first(monkeypatch, tmp_path):
    (tmp_path / "sharp_here.py").write_text("def taste(images, prompts, metadata):\n    return [1]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sharp_here", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert Callable(function="sharp_here:taste").load(CPU)(torch.zeros(1), ["a"], [{}]).value.tolist() == [
        1.0
    ]
