"""The four classes keep posttrain's laws, and compute what they say."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from posttrain_example.algorithm import ScheduledHuber
from posttrain_example.data import PngPrompts
from posttrain_example.model import Pixels
from posttrain_example.reward import Colorfulness, colorfulness

from posttrain.policy.tuning import Lora
from posttrain.testing import AlgorithmLaws, DataLaws, ModelLaws, RewardLaws

SETTINGS = "Negative prompt: people\nSteps: 20, Sampler: Euler, Size: 40x24"


class TestScheduledHuber(AlgorithmLaws):
    algorithm = ScheduledHuber()


class TestColorfulness(RewardLaws):
    reward = Colorfulness()


class TestPixels(ModelLaws):
    model = Pixels(width=16, depth=2)
    sizes = ((32, 32), (32, 16))
    lora = Lora(rank=2, targets=["first", "second"])


class TestPngPrompts(DataLaws):
    @pytest.fixture(autouse=True)
    def files(self, tmp_path):
        for i, color in enumerate(["red", "green", "blue", "yellow", "white"]):
            text = PngInfo()
            text.add_text("parameters", f"a {color} wall,\nwide\n" + SETTINGS)
            Image.new("RGB", (40, 24), color).save(tmp_path / f"{i}.png", pnginfo=text)
        self.data = PngPrompts(folder=tmp_path, resolution=32)

    def test_the_prompt_ends_where_the_settings_begin(self):
        with self.opened() as source:
            assert source.prompts[0] == "a red wall, wide"


def test_the_loss_is_a_square_below_its_threshold_and_linear_above():
    def policy_off_by(error) -> Any:
        return SimpleNamespace(velocity=lambda latents, sigma, condition: torch.full_like(latents, error))

    items = TestScheduledHuber().collected()
    items.fields["target"].zero_()
    items.fields["sigma"].fill_(1.0)
    loss = ScheduledHuber(threshold=0.1).loss
    small, large = (loss(items, policy_off_by(error)).per_item for error in (1e-3, 10.0))
    torch.testing.assert_close(small, torch.full_like(small, 1e-6), rtol=1e-2, atol=0)
    torch.testing.assert_close(large, torch.full_like(large, 2 * 0.1 * (10 - 0.1)), rtol=1e-3, atol=0)


def test_colorfulness_of_known_images():
    grey, red = torch.full((1, 3, 2, 2), 0.3), torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1.0
    assert colorfulness(grey).item() == 0
    assert colorfulness(red).item() == pytest.approx(0.3 * math.hypot(255, 127.5))
    half = red.clone()
    half[..., 0] = 0.0  # half of the pixels are black
    expected = 1.3 * math.hypot(127.5, 63.75)
    assert colorfulness(half).item() == pytest.approx(expected)
