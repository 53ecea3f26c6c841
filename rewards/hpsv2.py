"""HPSv2: scores which image people would prefer for the prompt (Wu et al. 2023, arXiv:2306.09341).

The published weights of version 2.1 are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.errors import RewardError
from posttrain.rewards._clip import Clip, in_batches, load_tokenizer
from posttrain.rewards._neural import Neural
from posttrain.rewards._open_clip import clip_of
from posttrain.rewards._pixels import by_longer_side
from posttrain.rewards._state import frozen, read
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class HPSv2(Neural):
    """The cosine between image and prompt in a CLIP ViT-H tuned on people's choices, typically about 0.28.

    It is computed in float32. The published code uses 16 bits on a GPU.
    """

    type: Literal["hpsv2"] = "hpsv2"
    range: ClassVar = (-1.0, 1.0)

    weights: ClassVar = {
        "path": Weights(("HPS_v2.1_compressed.pt",), 1_972_000_000, "Apache-2.0"),
        "tokenizer": Weights(("tokenizer.json", "tokenizer_config.json"), 3_644_000, "MIT"),
    }

    path: str = "xswu/HPSv2"
    """Weights: a hub name, a folder with ``HPS_v2.1_compressed.pt``, or such a file."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Any CLIP tokenizer of the standard vocabulary: a hub name or a folder."""

    def scorer(self, device: torch.device) -> Scorer:
        tokenizer = load_tokenizer(self.located("tokenizer"))
        file = self.located("path")
        state = read(file, "state_dict")
        model = clip_of(state, file)
        last_token = len(state["token_embedding.weight"]) - 1
        if tokenizer.eos_token_id != last_token:
            raise RewardError(
                f"hpsv2: the tokenizer {self.tokenizer!r} ends a text with token {tokenizer.eos_token_id}, "
                f"the weights expect {last_token}: give another 'tokenizer'"
            )
        clip = Clip(frozen(model, device), tokenizer, device)

        def score_batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return clip.cosine(by_longer_side(images.to(device), clip.image_size), prompts)

        return in_batches(score_batch, self.batch_size)
