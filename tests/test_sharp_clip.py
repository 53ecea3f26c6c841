"""Scores of CLIP's rewards by their published divisors, with a tiny random CLIP."""

from types import SimpleNamespace

import pytest
import torch
from tiny_clip import tiny_clip

from posttrain.errors import RewardError
from posttrain.rewards import aesthetic, hpsv2
from posttrain.rewards._clip import load_clip, load_pixels
from posttrain.rewards._pixels import by_longer_side, by_shorter_side
from posttrain.rewards.aesthetic import Aesthetic
from posttrain.rewards.clipscore import CLIPScore
from posttrain.rewards.hpsv2 import HPSv2
from posttrain.rewards.pickscore import PickScore

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two dogs", "a red hat"]
INFINITY = float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"), 16)


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder, folder, CPU)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.rand(3, 3, 20, 24)


def cosines(clip, pixels):
    with torch.no_grad():
        return torch.nn.functional.cosine_similarity(clip.of_images(pixels), clip.of_texts(PROMPTS))


def test_pickscore_is_the_logit_over_26(folder, clip, images):
    reward = PickScore(path=str(folder), processor=str(folder), batch_size=2)
    got = reward.load(CPU)(images, PROMPTS, [{}] * 3)
    expected = cosines(clip, load_pixels(folder)(images)) * float(clip.model.logit_scale.exp()) / 26
    torch.testing.assert_close(got.value, expected, atol=1e-6, rtol=1e-5)
    assert got.details == {}
    assert PickScore.range == (-100 / 26, 100 / 26)


def test_clipscore_is_the_logit_over_100(folder, clip, images):
    got = CLIPScore(path=str(folder), batch_size=2).load(CPU)(images, PROMPTS, [{}] * 3)
    expected = cosines(clip, by_shorter_side(images, 16)) * float(clip.model.logit_scale.exp()) / 100
    torch.testing.assert_close(got.value, expected, atol=1e-6, rtol=1e-5)
    assert CLIPScore.range == (-1.0, 1.0)


def test_pickscore_takes_weights_and_processor_from_two_folders(folder, images, tmp_path):
    weights, processor = tmp_path / "weights", tmp_path / "processor"
    for place in (weights, processor):
        place.mkdir()
    for file in folder.iterdir():
        is_weights = file.name in ("config.json", "model.safetensors")
        ((weights if is_weights else processor) / file.name).symlink_to(file)
    got = PickScore(path=str(weights), processor=str(processor)).load(CPU)(images, PROMPTS, [{}] * 3)
    whole = PickScore(path=str(folder), processor=str(folder)).load(CPU)(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(got.value, whole.value)
    with pytest.raises(RewardError):
        PickScore(path=str(folder), processor=str(weights)).load(CPU)


def test_the_aesthetic_score_is_the_heads_own_of_unit_features(folder, clip, images, tmp_path):
    torch.manual_seed(1)
    weights = [torch.randn(b, a) for a, b in ((16, 5), (5, 4), (4, 3), (3, 2), (2, 1))]
    state = {f"layers.{i}.weight": w for i, w in zip((0, 2, 4, 6, 7), weights, strict=True)}
    state |= {f"layers.{i}.bias": torch.randn(len(w)) for i, w in zip((0, 2, 4, 6, 7), weights, strict=True)}
    torch.save(state, tmp_path / "head.pth")
    got = Aesthetic(path=str(folder), head=str(tmp_path / "head.pth"), batch_size=2).load(CPU)(
        images, PROMPTS, [{}] * 3
    )
    with torch.no_grad():
        features = clip.of_images(load_pixels(folder)(images))
    values = features / features.norm(dim=1, keepdim=True)
    for i, weight in zip((0, 2, 4, 6, 7), weights, strict=True):
        values = values @ weight.T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(got.value, values[:, 0], atol=1e-4, rtol=1e-4)
    assert Aesthetic.range == (-INFINITY, INFINITY)


def test_hpsv2_is_the_bare_cosine_of_padded_images(folder, clip, images, monkeypatch, tmp_path):
    asked = []
    vocabulary = clip.model.config.text_config.vocab_size
    state = {"token_embedding.weight": torch.zeros(vocabulary, 2)}
    monkeypatch.setattr(hpsv2, "clip_of", lambda *given: (asked.append(given), clip.model)[1])
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    reward = HPSv2(path=str(tmp_path / "weights.pt"), tokenizer=str(folder), batch_size=2)
    got = reward.load(CPU)(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(got.value, cosines(clip, by_longer_side(images, 16)), atol=1e-6, rtol=1e-5)
    assert HPSv2.range == (-1.0, 1.0)
    assert [file for _, file in asked] == [tmp_path / "weights.pt"]
    state["token_embedding.weight"] = torch.zeros(vocabulary + 1, 2)
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    words = f"hpsv2: the tokenizer '{folder}' ends a text with token {vocabulary - 1}, the weights expect {vocabulary}:"
    with pytest.raises(RewardError) as caught:
        reward.load(CPU)
    assert str(caught.value).startswith(words)


def test_where_weights_come_from_and_how_large_they_are():
    """``rewards fetch`` takes these, and ``plan`` counts them."""
    clip_l = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer*.json")
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    expected = {
        CLIPScore: {"path": (clip_l, 1_712_766_000, "MIT")},
        Aesthetic: {
            "path": (clip_l, 1_712_766_000, "MIT"),
            "head": (("aesthetic-model.pth",), 3_714_000, "Apache-2.0"),
        },
        HPSv2: {
            "path": (("HPS_v2.1_compressed.pt",), 1_972_000_000, "Apache-2.0"),
            "tokenizer": (tokenizer, 3_644_000, "MIT"),
        },
        PickScore: {
            "path": (("config.json", "model.safetensors"), 3_944_517_836, "MIT"),
            "processor": (("preprocessor_config.json", "tokenizer*.json"), 3_644_497, "MIT"),
        },
    }
    for kind, fields in expected.items():
        assert {name: (w.files, w.size, w.licence) for name, w in kind.weights.items()} == fields
        assert kind.higher_is_better
    assert (CLIPScore().path, PickScore().path) == (
        "openai/clip-vit-large-patch14",
        "yuvalkirstain/PickScore_v1",
    )
    assert (Aesthetic().path, Aesthetic().head) == (
        "openai/clip-vit-large-patch14",
        "trl-lib/ddpo-aesthetic-predictor",
    )
    assert (HPSv2().path, HPSv2().tokenizer, PickScore().processor) == (
        "xswu/HPSv2",
        *["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"] * 2,
    )


def test_the_aesthetic_head_has_the_width_of_clips_features(folder, monkeypatch, tmp_path):
    places = []
    config = SimpleNamespace(projection_dim=16)
    monkeypatch.setattr(
        aesthetic,
        "load_clip",
        lambda a, b, device: (
            places.append((a, b, device)),
            SimpleNamespace(model=SimpleNamespace(config=config)),
        )[1],
    )
    monkeypatch.setattr(aesthetic, "read", lambda file: {"file": file})
    monkeypatch.setattr(aesthetic, "linear_head", lambda state, width, file: (state["file"], width, file))
    monkeypatch.setattr(aesthetic, "frozen", lambda head, device: (places.append((head, device)), head)[1])
    (tmp_path / "h.pth").touch()
    Aesthetic(path=str(folder), head=str(tmp_path / "h.pth")).load(CPU)
    file = tmp_path / "h.pth"
    assert places == [(folder, folder, CPU), ((file, 16, file), CPU)]
