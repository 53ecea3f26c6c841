"""ImageReward is read from its published checkpoint, and its score is the published formula."""

import math
import string

import pytest
import torch
from torch import nn

from posttrain.errors import RewardError
from posttrain.rewards._pixels import of_pil
from posttrain.rewards.imagereward import ImageReward
from posttrain.support.images import to_pil

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
WORDS += ["##" + letter for letter in string.ascii_lowercase]
PROMPTS = ["a cat", "two dogs on a wall", "a red hat", "abcdefghij " * 9, "trees"]
WIDTH, SEEN = 128, 192
"""Of the text tower and of the vision tower, with two and three heads of 64."""


def attention(query, key, value, heads, mask=None):
    """Multi-head attention written out; ``mask`` (n, keys) is 0 where there is nothing to read."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Reference:
    """BLIP's forward on a checkpoint's own names, written down to be compared with."""

    def __init__(self, layers=2):
        torch.manual_seed(3)
        self.state, self.layers = {}, layers
        eye, text = "blip.visual_encoder.", "blip.text_encoder."
        self.add(eye + "cls_token", 1, 1, SEEN)
        self.add(eye + "pos_embed", 1, 17, SEEN)
        self.linear(eye + "patch_embed.proj", SEEN, 3, 8, 8)
        self.add(text + "embeddings.word_embeddings.weight", len(WORDS) + 2, WIDTH)
        self.add(text + "embeddings.position_embeddings.weight", 40, WIDTH)
        self.state[text + "embeddings.position_ids"] = torch.arange(40)[None]
        self.linear(text + "embeddings.LayerNorm", WIDTH)
        self.linear(eye + "norm", SEEN)
        for i in range(layers):
            block = f"{eye}blocks.{i}."
            for name, *shape in (
                ("norm1", SEEN), ("norm2", SEEN), ("attn.qkv", 3 * SEEN, SEEN), ("attn.proj", SEEN, SEEN),
                ("mlp.fc1", 80, SEEN), ("mlp.fc2", SEEN, 80),
            ):  # fmt: skip
                self.linear(block + name, *shape)
            layer = f"{text}encoder.layer.{i}."
            for kind, width in (("attention", WIDTH), ("crossattention", SEEN)):
                self.linear(f"{layer}{kind}.self.query", WIDTH, WIDTH)
                self.linear(f"{layer}{kind}.self.key", WIDTH, width)
                self.linear(f"{layer}{kind}.self.value", WIDTH, width)
                self.linear(f"{layer}{kind}.output.dense", WIDTH, WIDTH)
                self.linear(f"{layer}{kind}.output.LayerNorm", WIDTH)
            self.linear(layer + "intermediate.dense", 96, WIDTH)
            self.linear(layer + "output.dense", WIDTH, 96)
            self.linear(layer + "output.LayerNorm", WIDTH)
        for name in ("vision_proj", "text_proj"):  # of pretraining; the score has no use for them
            self.linear(f"blip.{name}", 8, SEEN if name == "vision_proj" else WIDTH)
        sizes = [WIDTH, 20, 12, 8, 6, 1]
        for place, i in zip((0, 2, 4, 6, 7), range(5), strict=True):
            self.linear(f"mlp.layers.{place}", sizes[i + 1], sizes[i])

    def add(self, name, *shape):
        self.state[name] = torch.randn(shape)

    def linear(self, name, *shape):
        """A layer, or a norm, that keeps its input's size: or attention would have nothing to tell."""
        self.add(name + ".weight", *shape)
        self.state[name + ".weight"] *= 1.5 / math.prod(shape[1:]) ** 0.5
        self.add(name + ".bias", shape[0])
        self.state[name + ".bias"] *= 0.1

    def __getitem__(self, name):
        return self.state["blip." + name]

    def by(self, name, x):
        return nn.functional.linear(x, self[name + ".weight"], self[name + ".bias"])

    def norm(self, name, x, eps):
        return nn.functional.layer_norm(x, x.shape[-1:], self[name + ".weight"], self[name + ".bias"], eps)

    def see(self, pixels):
        p = "visual_encoder."
        x = nn.functional.conv2d(
            pixels, self[p + "patch_embed.proj.weight"], self[p + "patch_embed.proj.bias"], 8
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self[p + "cls_token"].expand(len(x), -1, -1), x], 1) + self[p + "pos_embed"]
        for i in range(self.layers):
            b = f"{p}blocks.{i}."
            q, k, v = self.by(b + "attn.qkv", self.norm(b + "norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.by(b + "attn.proj", attention(q, k, v, 3))
            y = nn.functional.gelu(self.by(b + "mlp.fc1", self.norm(b + "norm2", x, 1e-6)))
            x = x + self.by(b + "mlp.fc2", y)
        return self.norm(p + "norm", x, 1e-6)

    def read(self, ids, mask, seen):
        p = "text_encoder."
        x = self[p + "embeddings.word_embeddings.weight"][ids]
        x = x + self[p + "embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(p + "embeddings.LayerNorm", x, 1e-12)
        for i in range(self.layers):
            b = f"{p}encoder.layer.{i}."
            for kind, other, hidden in (("attention", None, mask), ("crossattention", seen, None)):
                a, source = f"{b}{kind}.", x if other is None else other
                parts = self.by(a + "self.key", source), self.by(a + "self.value", source)
                y = attention(self.by(a + "self.query", x), *parts, 2, hidden)
                x = self.norm(a + "output.LayerNorm", self.by(a + "output.dense", y) + x, 1e-12)
            y = nn.functional.gelu(self.by(b + "intermediate.dense", x))
            x = self.norm(b + "output.LayerNorm", self.by(b + "output.dense", y) + x, 1e-12)
        return x[:, 0]

    def score(self, pixels, ids, mask):
        x = self.read(ids, mask, self.see(pixels))
        for place in (0, 2, 4, 6, 7):
            name = f"mlp.layers.{place}"
            x = nn.functional.linear(x, self.state[name + ".weight"], self.state[name + ".bias"])
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the reference, a reward with the same weights and a tiny BERT tokenizer)."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("imagereward")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    reference = Reference()
    torch.save(reference.state, folder / "ImageReward.pt")
    return reference, ImageReward(path=str(folder), tokenizer=str(folder), batch_size=2)


def spelled(prompt):
    """The ids of a prompt as BERT's tokenizer has them where every word is spelled, and their mask."""
    ids = [WORDS.index("##" * (i > 0) + c) for word in prompt.split() for i, c in enumerate(word)][:33]
    ids = [WORDS.index("[CLS]"), *ids, WORDS.index("[SEP]")]
    return ids + [0] * (35 - len(ids)), [1] * len(ids) + [0] * (35 - len(ids))


def test_the_score_is_the_published_networks(published):
    reference, reward = published
    assert reward.problem() is None
    images = torch.rand(5, 3, 40, 56)
    got = reward.load(CPU)(images, PROMPTS, [{}] * 5).value
    ids, mask = (torch.tensor(x) for x in zip(*map(spelled, PROMPTS), strict=True))
    expected = reference.score(of_pil(to_pil(images), 32), ids, mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert len(got.unique()) == 5


def test_each_image_is_read_with_its_own_prompt_alone(published):
    _, reward = published
    score, images = reward.load(CPU), torch.rand(3, 3, 32, 32)
    together = score(images, PROMPTS[:3], [{}] * 3).value
    alone = [score(images[i : i + 1], PROMPTS[i : i + 1], [{}]).value for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "holds no ImageReward: 'pos_embed'"),
        (lambda s: s.pop("mlp.layers.4.bias"), "do not fit"),
        (lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"), r"1 missing \(encoder.layer.1.cross"),
        (lambda s: s.update({"blip.visual_encoder.blocks.0.extra": torch.zeros(1)}), r"1 left over \(encoder.layers.0.extra"),
        (lambda s: s.update({"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(9, WIDTH)}), "the weights expect 9"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(published, tmp_path, change, words):
    reference, reward = published
    state = dict(reference.state)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(RewardError, match=words):
        ImageReward(path=str(tmp_path / "changed.pt"), tokenizer=reward.tokenizer).load(CPU)
