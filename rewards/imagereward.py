"""ImageReward: scores which image people would prefer for the prompt (Xu et al. 2023, arXiv:2304.05977)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.errors import RewardError
from posttrain.rewards._blip import blip_of
from posttrain.rewards._clip import in_batches
from posttrain.rewards._neural import Neural
from posttrain.rewards._pixels import of_pil
from posttrain.rewards._state import load_tokenizer, read
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from posttrain.reward import Scorer

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's values on the training data, as published. Scores are in
standard deviations from the mean."""
MAX_TOKENS = 35
"""Longer prompts are cut off, as they were in training."""


class ImageReward(Neural):
    """ImageReward v1.0, typically between -2 and 2.

    BLIP's text tower reads the prompt and attends to the image; a linear head scores its output. Each image
    is paired with its own prompt only. Some published code pairs every image with every prompt, at n times
    the cost.
    """

    type: Literal["imagereward"] = "imagereward"
    range: ClassVar = (-float("inf"), float("inf"))

    weights: ClassVar = {
        "path": Weights(("ImageReward.pt",), 1_790_000_000, "Apache-2.0"),
        "tokenizer": Weights(("tokenizer.json", "tokenizer_config.json"), 466_110, "Apache-2.0"),
    }

    path: str = "zai-org/ImageReward"
    """Weights: a hub name, a folder with ``ImageReward.pt``, or such a file."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """BERT's tokenizer: a hub name or a folder."""

    def scorer(self, device: torch.device) -> Scorer:
        from transformers import BertTokenizer

        from posttrain.support.images import to_pil

        tokenizer = load_tokenizer(BertTokenizer, self.located("tokenizer"))
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP has these two besides BERT's
        file = self.located("path")
        blip = blip_of(read(file), file, device)
        if len(tokenizer) != blip.vocabulary:
            raise RewardError(
                f"imagereward: the tokenizer {self.tokenizer!r} has {len(tokenizer)} tokens with BLIP's two, "
                f"the weights expect {blip.vocabulary}: give another 'tokenizer'"
            )

        def score_batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
            text = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(device)
            pixels = of_pil(to_pil(images), blip.image_size).to(device)
            return (blip(pixels, text["input_ids"], text["attention_mask"]) - MEAN) / STD

        return in_batches(score_batch, self.batch_size)
