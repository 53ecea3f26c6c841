"""UnifiedReward: what does a vision-language judge say of the image and its prompt (Wang et al. 2025,
arXiv:2503.05236)?

Any server of the OpenAI chat interface will do. Differences from what is published for Flow-GRPO:

* the question is worded anew from the published criteria (faithful to the caption, well made; 1 to 5 after
  ``Final Score:``): for figures to set beside published ones, give the published wording as ``question``;
* a reply without a score is asked for again and then an error; there it counts as 0;
* "Final Score: 45" is no score; there it is read as 4.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.reward import Scores
from posttrain.rewards._http import OverHttp, shown

if TYPE_CHECKING:
    import httpx
    from PIL.Image import Image

    from posttrain.reward import Scorer

SIDE = 512
HIGHEST = 5
QUESTION = (
    "This image was generated from a text caption. Judge it by two things. First, faithfulness: are the "
    "objects, their attributes and their relations those of the caption? Second, quality: is it clear, "
    "detailed, natural in its colours, and pleasing? Explain briefly, then end with a line 'Final Score:' "
    "and one number from 1 (bad) to 5 (excellent); decimals are allowed.\n"
    "Caption: {prompt}"
)
SCORE = re.compile(
    r"final score:[\s*\[(]*([1-5](?:\.\d+)?)(?![.,]?\d)(?!\s*+/\s*+(?!5(?!\.?\d)))", re.IGNORECASE
)
"""A number after the words, bold or in brackets or not, that is no part of another one and no 'of 10'."""


class UnifiedReward(OverHttp):
    """The judge's score of 1 to 5, over 5 (tables show 5 times that)."""

    type: Literal["unifiedreward"] = "unifiedreward"
    range: ClassVar = (1 / HIGHEST, 1.0)

    model: str = "CodeGoat24/UnifiedReward-7b-v1.5"
    """What the server calls the judge."""
    question: str = Field(QUESTION, pattern=r"\{prompt\}")
    """What is asked; ``{prompt}`` stands for the prompt."""
    concurrency: int = Field(8, ge=1)
    """Images that are judged at the same time."""

    def load(self, device: torch.device) -> Scorer:
        del device  # the server has its own
        from posttrain.support.images import to_pil

        client, url = self.client(), f"{self.url.rstrip('/')}/chat/completions"

        def judged(image: Image, prompt: str) -> float:
            body = self._request(image, prompt)
            return self.asked(lambda: client.post(url, json=body), url, score_in) / HIGHEST

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            with ThreadPoolExecutor(self.concurrency) as pool:
                waiting = [pool.submit(judged, i, p) for i, p in zip(to_pil(images), prompts, strict=True)]
                try:
                    return Scores(torch.tensor([future.result() for future in waiting]))
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)  # after a failure the rest is not asked

        return score

    def _request(self, image: Image, prompt: str) -> dict[str, Any]:
        file = io.BytesIO()
        image.resize((SIDE, SIDE)).save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            # not str.format: a prompt may hold braces
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        return {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }


def score_in(response: httpx.Response) -> float:
    """The last score in the judge's reply, 1 to 5. Raises ValueError where there is none."""
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"not a chat completion: {shown(response)!r}") from error
    found = [float(number) for number in SCORE.findall(text or "")]
    if not found or found[-1] > HIGHEST:
        raise ValueError(f"no 'Final Score:' of 1 to {HIGHEST} in the reply {(text or '')[-200:]!r}")
    return found[-1]
