"""Our rewards and data keep the laws of posttrain.testing; algorithms and models have files of their own."""

import pytest
from image_layouts import LAYOUTS
from tiny_clip import tiny_clip

from posttrain.data.family import Data
from posttrain.data.image_data import ImageData, ShapesData
from posttrain.data.pair_data import PairData, ShapesPairData
from posttrain.data.prompt_data import PromptData
from posttrain.data.settings import ShapesPrompts
from posttrain.registry import discover
from posttrain.reward import Reward
from posttrain.rewards.pickscore import PickScore
from posttrain.testing import (
    BlockLaws,
    DataLaws,
    RewardLaws,
)

REWARDS = discover(Reward, "posttrain.rewards")
REQUIRED = {
    "callable": {"function": "statistics:mean"},
    "remote": {"url": "http://127.0.0.1:1", "name": "x"},
    "unifiedreward": {"url": "http://127.0.0.1:1"},
}
"""Fields without a default."""


class TestEveryRewardsBlock(BlockLaws):
    @pytest.fixture(autouse=True, params=sorted(REWARDS))
    def each(self, request):
        self.block = self.reward = REWARDS[request.param](**REQUIRED.get(request.param, {}))

    test_it_says_its_range_and_what_it_needs = RewardLaws.test_it_says_its_range_and_what_it_needs


class TestEveryRewardWithoutWeights(RewardLaws):
    @pytest.fixture(
        autouse=True,
        params=sorted(n for n, kind in REWARDS.items() if not kind.weights and n not in REQUIRED),
    )
    def each(self, request):
        self.reward = REWARDS[request.param]()


class TestARewardWithANetwork(RewardLaws):
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return str(tiny_clip(tmp_path_factory.mktemp("clip")))

    @pytest.fixture(autouse=True)
    def each(self, folder):
        self.reward = PickScore(path=folder, processor=folder)


class TestEveryDataSource(DataLaws):
    @pytest.fixture(autouse=True, params=sorted(discover(Data, "posttrain.data")))
    def each(self, request, tmp_path):
        made = {
            "images": lambda: ImageData(images=LAYOUTS["captions"](tmp_path), resolution=32),
            "shapes": lambda: ShapesData(images=10),
            "pairs": lambda: PairData(pairs=self.pairs(tmp_path), resolution=64),
            "shapes_pairs": lambda: ShapesPairData(pairs=10),
            "prompts": lambda: PromptData(prompts=ShapesPrompts(count=10), resolution=64),
        }
        self.data = made[request.param]()
        self.samples_per_prompt = 2 if request.param == "prompts" else 1

    def pairs(self, folder):
        return (
            ShapesPairData(pairs=10)
            .build(folder)
            .pairs.rename(folder / "shapes-pairs-10-0" / "images" / "p.jsonl")
        )
