"""UnifiedReward: asks a vision-language model to score the image (Wang et al. 2025, arXiv:2503.05236).

Any server with OpenAI's chat interface can serve the model. Differences from Flow-GRPO's published code:

* The question is written anew, by the published criteria: faithfulness to the caption and quality, with 1 to
  5 after ``Final Score:``. To compare with published numbers, give the published text as ``question``.
* A reply without a score is asked for again. In the end it is as a score that is not finite: the step is
  refused, since asking for the same images on the next run would not help. The published code counts it as 0.
* "Final Score: 45" is not a score. The published code reads it as 4.
"""

from __future__ import annotations

import base64
import io
import math
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.errors import NotFinite, RewardError
from posttrain.registry import FREE
from posttrain.reward import Scores
from posttrain.rewards._http import OverHttp

if TYPE_CHECKING:
    from PIL.Image import Image

    from posttrain.reward import Scorer
    from posttrain.rewards._link import Answer

SIDE = 512
"""Height and width in pixels of the images sent to the server."""
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
"""The number after "Final Score:", also in bold or brackets. "45" and "4 / 10" do not match."""


class NoScore(ValueError):
    """The model's reply has no score."""


class UnifiedReward(OverHttp):
    """The model's score from 1 to 5, divided by 5. Published tables show the undivided score."""

    type: Literal["unifiedreward"] = "unifiedreward"
    range: ClassVar = (1 / HIGHEST, 1.0)

    model: str = "CodeGoat24/UnifiedReward-7b-v1.5"
    """The server's name of the model."""
    question: str = Field(default=QUESTION, pattern=r"\{prompt\}", examples=["Does it show {prompt}?"])
    """The question to the model; ``{prompt}`` is replaced by the prompt."""
    concurrency: Annotated[int, FREE] = Field(default=8, ge=1, le=1024)
    """How many images are sent to the server at the same time."""

    def load(self, device: torch.device) -> Scorer:
        del device  # the server has its own
        from posttrain.support.images import to_pil
        from posttrain.support.worker import in_threads

        link, url = self.link(), f"{self.url.rstrip('/')}/chat/completions"

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            failed = threading.Event()

            def score_image(image: Image, prompt: str) -> float | RewardError:
                if failed.is_set():  # send no more images; the error is raised before this is looked at
                    return math.nan
                try:
                    return (
                        self.asked(link, "POST", url, score_in, json=self._request(image, prompt)) / HIGHEST
                    )
                except BaseException as error:
                    if isinstance(error, RewardError) and isinstance(error.__cause__, NoScore):
                        return error  # of this image alone
                    failed.set()
                    raise

            futures = in_threads("judge", self.concurrency, score_image, to_pil(images), prompts)
            try:
                found = [future.result() for future in futures]
            finally:
                failed.set()
            if unread := {i: error for i, error in enumerate(found) if isinstance(error, RewardError)}:
                raise NotFinite(str(next(iter(unread.values()))), [*unread])
            return Scores(torch.tensor(found))

        return score

    def _request(self, image: Image, prompt: str) -> dict[str, Any]:
        file = io.BytesIO()
        image.resize((SIDE, SIDE)).save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            # not str.format, since a prompt may contain braces
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        return {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }


def score_in(answer: Answer) -> float:
    """The last score in the model's reply, 1 to 5. Raises NoScore if it has none, ValueError if it is no
    reply."""
    try:
        text = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"not a chat completion: '{answer.excerpt()}'") from error
    text = text if isinstance(text, str) else ""
    scores = [float(number) for number in SCORE.findall(text)]
    if not scores or scores[-1] > HIGHEST:
        raise NoScore(f"no 'Final Score:' of 1 to {HIGHEST} in the reply {text[-200:]!r}")
    return scores[-1]
