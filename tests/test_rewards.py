"""The rewards give the published scores, and say what they cannot score."""

import io
import json

import numpy as np
import pytest
import torch
from parity_vectors import FOLDER
from PIL import Image, ImageDraw, ImageFont
from tiny_clip import tiny_clip

from posttrain.data.prompts import read_prompts
from posttrain.errors import DataError, RewardError
from posttrain.reward import Scores, checked
from posttrain.rewards.callable import Callable
from posttrain.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from posttrain.rewards.ocr import OCR, quoted, similarity
from posttrain.rewards.pickscore import SCALE, PickScore
from posttrain.rewards.shapes import Shapes
from posttrain.support.images import to_pil

CPU = torch.device("cpu")
RECORDED = [json.loads(line) for line in (FOLDER / "ocr_reward.jsonl").read_text().splitlines()]


def test_parity_ocr_reward():
    assert len(RECORDED) == 120
    for row in RECORDED:
        got = similarity(quoted(row["prompt"]), row["recognized"])
        assert got == pytest.approx(row["reward"], abs=1e-9), row


def written(word, width, height, size):
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text(
        (width / 2, height / 2), word, fill="black", anchor="mm", font=ImageFont.load_default(size)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("width", "height", "size"), [(64, 32, 16), (128, 128, 24), (256, 256, 40), (512, 512, 64)]
)
def test_ocr_reads_words_that_were_drawn(width, height, size):
    words = ["STOP", "OPEN", "CAFE", "EXIT"]
    images = torch.stack([written(w, width, height, size) for w in words])
    prompts = [f'a sign that says "{w.lower()}"' for w in words]
    ocr = OCR().load(CPU)
    assert ocr(images, prompts, [{}] * 4).value.tolist() == [1.0] * 4
    wrong = ocr(images, prompts[1:] + prompts[:1], [{}] * 4).value
    assert wrong.max() < 0.8
    assert ocr(torch.ones(1, 3, height, width), prompts[:1], [{}]).value.tolist() == [0.0]


def test_a_prompt_that_a_reward_cannot_score_is_refused_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('a sign "A"\n\na sign without words\na sign ""\n')
    with pytest.raises(DataError) as caught:
        read_prompts(file, [OCR()])
    message = str(caught.value)
    assert "2 prompts cannot be used" in message
    assert "3: ocr: there is no text between double quotes" in message
    assert "4: ocr: the text between the double quotes is empty" in message
    with pytest.raises(DataError, match="no GenEval metadata"):
        read_prompts(file, [Shapes()])


def test_jpeg_sizes_are_pillows():
    images = torch.rand(3, 3, 32, 48)
    images[1] = 0.5
    sizes = []
    for image in to_pil(images):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    rich = JpegIncompressibility().load(CPU)(images, [""] * 3, [{}] * 3).value
    plain = JpegCompressibility().load(CPU)(images, [""] * 3, [{}] * 3).value
    torch.testing.assert_close(rich, torch.tensor(sizes))
    torch.testing.assert_close(plain, -rich / 500)
    assert rich.argmin() == 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(tiny_clip(tmp_path_factory.mktemp("clip")))


def test_pickscore_is_the_scaled_cosine_over_26(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    images, prompts = torch.rand(5, 3, 40, 56), ["a cat", "two dogs", "a red hat", "a cat", "trees"]
    score = PickScore(path=clip_folder, processor=clip_folder, batch_size=2).load(CPU)
    got = score(images, prompts, [{}] * 5).value
    processor, model = CLIPProcessor.from_pretrained(clip_folder), CLIPModel.from_pretrained(clip_folder)
    for i in range(5):
        inputs = processor(
            text=[prompts[i]], images=to_pil(images[i : i + 1]), return_tensors="pt", padding=True
        )
        with torch.no_grad():
            expected = model(**inputs).logits_per_image[0, 0] / SCALE
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-5)
    assert len(got.unique()) == 5


def test_pickscore_without_its_weights_says_what_to_give():
    with pytest.raises(
        RewardError, match=r"of 'nowhere/at-all'.*rewards fetch pickscore.*local copy as 'processor'"
    ):
        PickScore(path="nowhere/at-all", processor="nowhere/at-all").load(CPU)


def test_a_function_of_ones_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_taste.py").write_text(
        "from posttrain.reward import Reward\nfive = 5\nclass Taste(Reward):\n    pass\n"
        "def redness(images, prompts, metadata):\n    return [float(i[0].mean() - i[1:].mean()) for i in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = Callable(function="my_taste:redness")
    assert reward.problem() is None
    assert reward.label == "redness"
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert reward.load(CPU)(red, ["", ""], [{}, {}]).value.tolist() == [1, 1]
    with pytest.raises(RewardError, match="the module 'my_taste' has no 'blueness'"):
        Callable(function="my_taste:blueness").load(CPU)
    with pytest.raises(
        RewardError, match=r"is a class of rewards, no function: .*\[{type: 'my_taste:Taste'}\]"
    ):
        Callable(function="my_taste:Taste").load(CPU)
    with pytest.raises(RewardError, match="'my_taste:five' is int, no function"):
        Callable(function="my_taste:five").load(CPU)
    assert "no module 'my_tasto'" in Callable(function="my_tasto:redness").problem()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda n: [1.0] * (n - 1), "for 3 images"),
        (lambda n: [1.0, float("inf"), 0.0], "returned inf for prompt 'b'"),
        (lambda n: 1 / 0, "failed on prompts such as 'a'"),
        (lambda n: ["good"] * n, "failed on prompts such as 'a'"),
    ],
)
def test_what_is_no_score_is_refused(returned, words):
    def own(images, prompts, metadata):
        from posttrain.reward import Scores

        return Scores(torch.as_tensor(returned(len(prompts)), dtype=torch.float32))

    with pytest.raises(RewardError, match=words):
        checked("own", own)(torch.zeros(3, 3, 4, 4), ["a", "b", "c"], [{}] * 3)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([0.5, 0.5], "reward 'own' returned list, where Scores are expected"),
        (torch.zeros(2), "returned Tensor, where Scores"),
        (None, "returned NoneType, where Scores"),
        (Scores([0.5, 0.5]), "returned value as list, not as a tensor"),  # pyright: ignore[reportArgumentType]
        (Scores(torch.zeros(2), {"part": [1, 2]}), "returned part as list"),  # pyright: ignore[reportArgumentType]
        (Scores(torch.zeros(2), None), "returned details as NoneType, no dict"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_scorer_that_gives_no_scores_is_named(returned, words):
    with pytest.raises(RewardError, match=words):
        checked("own", lambda images, prompts, metadata: returned)(
            torch.zeros(2, 3, 4, 4), ["a", "b"], [{}] * 2
        )
