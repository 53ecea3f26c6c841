"""Rewards that a network judges, by hand: ImageReward's scale and tokens, a chat server's words."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import RewardError
from posttrain.rewards import imagereward
from posttrain.rewards._link import Answer
from posttrain.rewards._pixels import of_pil
from posttrain.rewards.imagereward import ImageReward
from posttrain.rewards.unifiedreward import HIGHEST, QUESTION, SIDE, UnifiedReward, score_in

CPU = torch.device("cpu")
INFINITY = float("inf")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"]


@pytest.fixture
def blip(monkeypatch, tmp_path):
    """An ImageReward whose network answers 1, 2, 3 and keeps what it was given."""
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "ImageReward.pt").touch()

    class Network:
        image_size, vocabulary, given, made = 8, len(WORDS) + 2, [], []

        def __call__(self, pixels, ids, mask):
            self.given.append((pixels, ids, mask))
            return torch.arange(len(pixels)) + 1.0

    network = Network()
    monkeypatch.setattr(imagereward, "read", lambda file: {"of": file})
    monkeypatch.setattr(imagereward, "blip_of", lambda *given: (network.made.append(given), network)[1])
    network.reward = ImageReward(path=str(tmp_path), tokenizer=str(tmp_path), batch_size=2)
    network.file = tmp_path / "ImageReward.pt"
    return network


def test_imagereward_is_the_networks_value_in_published_deviations(blip):
    images = torch.rand(3, 3, 12, 9)
    got = blip.reward.load(CPU)(images, ["cat", "dog " * 50, "cat dog"], [{}] * 3)
    mean, std = 0.16717362830052426, 1.0333394966054072
    assert got.value.tolist() == pytest.approx([(v - mean) / std for v in (1, 2, 1)])
    assert blip.made == [({"of": blip.file}, blip.file, CPU)]
    (pixels, ids, mask), (_, last, _) = blip.given
    pictures = [
        Image.fromarray((i.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for i in images[:2]
    ]
    torch.testing.assert_close(pixels, of_pil(pictures, 8))
    assert ids.tolist() == [[2, 5, 3, *[0] * 32], [2, *[6] * 33, 3]]
    assert mask.tolist() == [[1] * 3 + [0] * 32, [1] * 35]
    assert last.tolist() == [[2, 5, 6, 3, *[0] * 31]]
    assert ImageReward.range == (-INFINITY, INFINITY)
    blip.reward.load(CPU)(images[:1], ["[dec] [DEC]"], [{}])
    assert blip.given[-1][1][0, :6].tolist() == [2, 1, 1, 1, 7, 3], (
        "BLIP's tokens are special: written exactly so"
    )


def test_imagereward_refuses_a_tokenizer_of_another_vocabulary(blip):
    blip.vocabulary += 1
    words = rf"^imagereward: the tokenizer '.*' has {len(WORDS) + 2} tokens with BLIP's two, the weights expect {len(WORDS) + 3}:"
    with pytest.raises(RewardError, match=words):
        blip.reward.load(CPU)


def test_where_imagerewards_weights_come_from():
    found = {name: (w.files, w.size, w.licence) for name, w in ImageReward.weights.items()}
    assert found == {
        "path": (("ImageReward.pt",), 1_790_000_000, "Apache-2.0"),
        "tokenizer": (("tokenizer.json", "tokenizer_config.json"), 466_110, "Apache-2.0"),
    }
    assert (ImageReward().path, ImageReward().tokenizer) == (
        "zai-org/ImageReward",
        "google-bert/bert-base-uncased",
    )


def completion(text):
    return Answer(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def judged(monkeypatch, answer, **settings):
    """A UnifiedReward whose server is ``answer(request)``, and the bodies it was sent."""
    sent = []

    class Fake:
        def request(self, method, url, json):
            sent.append((url, json))
            return answer(json)

    monkeypatch.setattr(UnifiedReward, "link", lambda self: Fake())
    settings = {"retries": 0, "backoff_seconds": 0.0, **settings}
    return UnifiedReward(url="http://judge/v1/", **settings).load(CPU), sent


def picture(body):
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_judges_score_is_divided_by_5_for_each_image(monkeypatch):
    def answer(body):
        return completion(f"Final Score: {1 + picture(body).getpixel((0, 0))[0] / 51}")

    score, sent = judged(monkeypatch, answer)
    levels = [0.0, 0.2, 0.8]
    got = score(torch.tensor(levels).view(3, 1, 1, 1).expand(3, 3, 4, 6), ["a", "b {x}", "c"], [{}] * 3)
    assert got.value.tolist() == pytest.approx([0.2, 0.4, 1.0])
    assert got.details == {}
    assert (SIDE, HIGHEST, UnifiedReward.range) == (512, 5, (0.2, 1.0))
    assert {url for url, _ in sent} == {"http://judge/v1/chat/completions"}
    (body,) = [body for _, body in sent if "b {x}" in body["messages"][0]["content"][1]["text"]]
    assert picture(body).size == (512, 512)
    assert picture(body).format == "PNG"
    (message,) = body.pop("messages")
    image, text = message["content"]
    assert body == {"model": "CodeGoat24/UnifiedReward-7b-v1.5", "temperature": 0}
    assert (image["type"], text) == (
        "image_url",
        {"type": "text", "text": QUESTION.replace("{prompt}", "b {x}")},
    )
    assert message["role"] == "user"
    assert UnifiedReward(url="http://x").concurrency == 8


def test_after_a_failure_the_rest_is_not_asked(monkeypatch):
    def answer(body):
        return Answer(400, b"no")

    score, sent = judged(monkeypatch, answer, concurrency=1)
    with pytest.raises(RewardError, match="status 400: no"):
        score(torch.zeros(40, 3, 2, 2), ["a"] * 40, [{}] * 40)
    assert len(sent) == 1
    with pytest.raises(ValueError, match="argument 2"):
        score(torch.zeros(2, 3, 2, 2), ["a"], [{}])
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        UnifiedReward(url="http://x", concurrency=0)
    assert UnifiedReward(url="http://x", concurrency=1024).concurrency == 1024
    with pytest.raises(ValueError, match="less than or equal to 1024"):
        UnifiedReward(url="http://x", concurrency=1025)
    with pytest.raises(ValueError, match=r"pattern|has not the form"):
        UnifiedReward(url="http://x", question="Is it good?")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4), ("final score:1", 1), ("**Final Score:** [3.75]", 3.75), ("Final Score: 5.0", 5), ("Final Score: 4.", 4),
        ("Final Score: 2 / 5", 2), ("Final Score: 1. Final Score: 3", 3), ("Final Score: 5.5. Final Score: 3", 3), ("Final Score: 3. Final Score: 5.5", None),
        *((f"Final Score: {t}", None) for t in ("5.5", "0", "45", "6", "4/10", "4 / 5.5", "3,75", "4.5.1", "x")), ("4", None), (None, None),
    ],
)  # fmt: skip
def test_the_last_score_of_1_to_5_is_read(text, score):
    if score is not None:
        assert score_in(completion(text)) == score
        return
    with pytest.raises(ValueError, match=r"^no 'Final Score:' of 1 to 5 in the reply "):
        score_in(completion(text))


def test_a_reply_that_is_none_shows_its_beginning_and_a_long_one_its_end():
    for response in (
        Answer(200, b"<html>"),
        Answer(200, b"[]"),
        Answer(200, b'{"choices": null}'),
    ):
        with pytest.raises(ValueError, match=r"^not a chat completion: "):
            score_in(response)
    with pytest.raises(ValueError, match=f"in the reply '{'b' * 199}c'$"):
        score_in(completion("a" * 50 + "b" * 199 + "c"))
