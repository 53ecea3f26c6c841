"""CLIPScore, HPSv2 and the aesthetic score follow the published preprocessing, weights and formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import END, tiny_clip, tiny_tokenizer
from torch import nn

from posttrain.errors import RewardError
from posttrain.rewards._clip import load_clip
from posttrain.rewards._open_clip import clip_of
from posttrain.rewards._pixels import by_longer_side, by_shorter_side, of_pil
from posttrain.rewards.aesthetic import Aesthetic
from posttrain.rewards.clipscore import CLIPScore
from posttrain.rewards.hpsv2 import HPSv2
from posttrain.rewards.pickscore import PickScore
from posttrain.support.images import to_pil

CPU = torch.device("cpu")
SHAPES = [(40, 56), (57, 40), (16, 16), (96, 33), (32, 32)]
"""(height, width) of images that are made larger, smaller, and left as they are."""
PROMPTS = ["a cat", "two dogs on a wall", "a red hat", "a cat", "trees"]


def painted(height, width, seed=0):
    """A float image of a gradient, an edge and noise: what resampling and cropping must not confuse."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([x / width, y / height, (x > width / 3).astype(float)])
    return (image + random.normal(0, 0.1, image.shape)).clip(0, 1).astype(np.float32)


def resized(image, height, width, how):
    """Each channel through PIL in float, which antialiases."""
    channels = [np.array(Image.fromarray(c, "F").resize((width, height), how)) for c in image]
    return np.stack(channels)


def normal(image):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (image - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pixels_by_the_shorter_side_are_resized_and_cropped(height, width):
    image, size = painted(height, width), 32
    h, w = (size, size * width // height) if height <= width else (size * height // width, size)
    expected = resized(image, h, w, Image.Resampling.BILINEAR)
    top, left = round((h - size) / 2), round((w - size) / 2)
    expected = normal(expected[:, top : top + size, left : left + size])
    got = by_shorter_side(torch.from_numpy(image)[None], size)[0].numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pixels_by_the_longer_side_are_resized_and_padded_with_black(height, width):
    image, size = painted(height, width), 32
    h, w = round(height * size / max(height, width)), round(width * size / max(height, width))
    expected = np.zeros((3, size, size))
    top, left = (size - h) // 2, (size - w) // 2
    expected[:, top : top + h, left : left + w] = resized(image, h, w, Image.Resampling.BICUBIC)
    got = by_longer_side(torch.from_numpy(image)[None], size)[0].numpy()
    np.testing.assert_allclose(got, normal(expected), atol=2e-5)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pixels_of_8_bit_images_are_resized_bicubically_and_cropped(height, width):
    (image,) = to_pil(torch.from_numpy(painted(height, width))[None])
    size = 32
    h, w = (size, size * width // height) if height <= width else (size * height // width, size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    square = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    expected = normal(np.array(square).transpose(2, 0, 1) / 255)
    np.testing.assert_allclose(of_pil([image], size)[0].numpy(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.from_numpy(np.stack([painted(40, 56, seed) for seed in range(5)]))


def test_clipscore_is_the_logit_over_100(clip_folder, images):
    from transformers import CLIPModel, CLIPTokenizer

    got = CLIPScore(path=str(clip_folder), batch_size=2).load(CPU)(images, PROMPTS, [{}] * 5).value
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    text = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=by_shorter_side(images, 32), **text).logits_per_image.diagonal() / 100
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len(got.unique()) == 5


def test_a_prompt_of_more_than_77_tokens_is_cut_off(clip_folder, images):
    score = CLIPScore(path=str(clip_folder)).load(CPU)
    words = ["a b c d e " * 15, "a b c d e " * 15 + "f", "a b c d e " * 14 + "a b c d"]
    values = score(images[:1].expand(3, -1, -1, -1), words, [{}] * 3).value
    assert values[0] == values[1]  # 75 words, and the tokens of start and end
    assert values[0] != values[2]


def test_the_text_features_of_transformers_4_are_plain_tensors(clip_folder, monkeypatch):
    clip = load_clip(clip_folder, clip_folder, CPU)
    pixels = torch.randn(2, 3, 32, 32)
    wrapped = clip.cosine(pixels, ["a", "b"])
    for name in ("get_image_features", "get_text_features"):
        now = getattr(clip.model, name)
        monkeypatch.setattr(clip.model, name, lambda now=now, **given: now(**given).pooler_output)
    assert torch.equal(clip.cosine(pixels, ["a", "b"]), wrapped)


class Block(nn.Module):
    """A block of open_clip's transformer, whose attention is torch's own."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 96), "c_proj": nn.Linear(96, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, width=160, patch=8, size=32, out=24):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, width // 80, 3)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP as its checkpoints name it, written down to be compared with."""

    def __init__(self, width=128, positions=40, out=24):
        super().__init__()
        self.visual = Vision(out=out)
        self.token_embedding = nn.Embedding(END + 1, width)
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.transformer = Tower(width, width // 64, 2)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(14.0)))
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory):
    """(the reference, a reward with the same weights in the published format)."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("hpsv2"))
    reference = OpenClip().eval().requires_grad_(False)
    torch.save({"state_dict": reference.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return reference, HPSv2(path=str(folder), tokenizer=str(folder), batch_size=2)


def test_open_clip_weights_give_the_same_features_in_transformers(hpsv2, tmp_path):
    reference, _ = hpsv2
    model = clip_of(reference.state_dict(), tmp_path).eval()
    ids = torch.randint(0, END - 1, (3, 40))
    ids[:, 0], ids[0, 12], ids[1, 39], ids[2, 5] = END - 1, END, END, END
    ids[0, 13:], ids[2, 6:] = 0, 0  # open_clip pads with 0
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        got = model(pixel_values=pixels, input_ids=ids)
    image = nn.functional.normalize(reference.visual(pixels))
    text = nn.functional.normalize(reference.text(ids))
    torch.testing.assert_close(got.image_embeds, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.text_embeds, text, atol=1e-5, rtol=0)
    assert model.config.vision_config.image_size == 32


def test_hpsv2_is_the_cosine_without_a_scale(hpsv2, images):
    from transformers import CLIPTokenizer

    reference, reward = hpsv2
    got = reward.load(CPU)(images, PROMPTS, [{}] * 5).value
    ids = [CLIPTokenizer.from_pretrained(reward.tokenizer)(p)["input_ids"] for p in PROMPTS]
    text = torch.cat([reference.text(torch.tensor([i])) for i in ids])
    expected = nn.functional.cosine_similarity(reference.visual(by_longer_side(images, 32)), text)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert len(got.unique()) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("visual.ln_pre.weight"), "no CLIP in open_clip's format: 'visual.ln_pre.weight'"),
        (
            lambda s: s.update(extra=torch.zeros(1), logit_scale=torch.zeros(2)),
            r"1 left over \(extra\)",
        ),
        (lambda s: s.update({"visual.conv1.weight": torch.zeros(50, 3, 8, 8)}), "width of 50 is no multiple"),
    ],
)
def test_weights_that_do_not_fit_are_refused(hpsv2, tmp_path, change, words):
    reference, reward = hpsv2
    state = dict(reference.state_dict())
    change(state)
    torch.save({"state_dict": state}, tmp_path / "changed.pt")
    with pytest.raises(RewardError, match=words):
        HPSv2(path=str(tmp_path / "changed.pt"), tokenizer=reward.tokenizer).load(CPU)


def test_files_that_hold_no_weights_are_refused(hpsv2, tmp_path):
    _, reward = hpsv2
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    torch.save({"model": {}}, tmp_path / "other.pt")
    for name, words in (
        ("page.pt", "cannot be read as a torch file"),
        ("other.pt", "no weights under 'state_"),
    ):
        with pytest.raises(RewardError, match=words):
            HPSv2(path=str(tmp_path / name), tokenizer=reward.tokenizer).load(CPU)


def test_a_tokenizer_of_another_vocabulary_is_refused(hpsv2, tmp_path):
    _, reward = hpsv2
    state = dict(OpenClip().state_dict())
    state["token_embedding.weight"] = torch.zeros(END + 3, 128)
    torch.save({"state_dict": state}, tmp_path / "larger.pt")
    with pytest.raises(RewardError, match=f"ends a text with token {END}, the weights expect {END + 2}"):
        HPSv2(path=str(tmp_path / "larger.pt"), tokenizer=reward.tokenizer).load(CPU)


def aesthetic_head(width):
    torch.manual_seed(2)
    sizes = [width, 20, 12, 8, 6, 1]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    dropout = nn.Dropout(0.9)  # where the published head has some; scoring must not drop anything
    return nn.Sequential(layers[0], dropout, layers[1], dropout, layers[2], dropout, layers[3], layers[4])


def test_aesthetic_is_the_linear_head_on_normalised_features(clip_folder, images, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    head = aesthetic_head(16).eval()
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, file)
    reward = Aesthetic(path=str(clip_folder), head=str(file), batch_size=2)
    assert reward.problem() is None
    got = reward.load(CPU)(images, PROMPTS, [{}] * 5).value
    processor, model = CLIPProcessor.from_pretrained(clip_folder), CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        pixels = processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        features = model.visual_projection(model.vision_model(pixels).pooler_output)
        expected = head(nn.functional.normalize(features))[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len(got.unique()) == 5


def test_offloaded_networks_are_on_the_device_only_while_they_score(clip_folder, images, monkeypatch):
    stays = (
        PickScore(path=str(clip_folder), processor=str(clip_folder))
        .load(CPU)(images, PROMPTS, [{}] * 5)
        .value
    )
    moves = []
    to = nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda self, where: (moves.append((type(self).__name__, where)), to(self, where))[1]
    )
    device = torch.device("cpu", 0)  # another name of the CPU, to tell the two places apart
    score = PickScore(path=str(clip_folder), processor=str(clip_folder), offload=True).load(device)
    assert moves[-1] == ("CLIPModel", CPU), "it waits in main memory"
    moves.clear()
    torch.testing.assert_close(score(images, PROMPTS, [{}] * 5).value, stays)
    assert moves == [("CLIPModel", device), ("CLIPModel", CPU)]
    moves.clear()
    with pytest.raises((TypeError, ValueError, IndexError)):
        score(images, [None] * 5, [{}] * 5)
    assert moves[-1] == ("CLIPModel", CPU), "also after a failure"


def test_an_aesthetic_head_for_another_clip_is_refused(clip_folder, tmp_path):
    file = tmp_path / "head.pth"
    torch.save({f"layers.{n}": t for n, t in aesthetic_head(24).state_dict().items()}, file)
    with pytest.raises(RewardError, match=r"0\.weight: \(20, 24\), not \(20, 16\)"):
        Aesthetic(path=str(clip_folder), head=str(file)).load(CPU)
