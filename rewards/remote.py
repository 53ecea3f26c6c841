"""A reward on another machine or in another process: what ``posttrain serve-reward`` serves.

Images travel as float32, so the scores are those of the reward in this process, bit for bit (where the server
scores several requests together, a network's last bits may differ, as with another batch size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.errors import RewardError
from posttrain.reward import Scores
from posttrain.rewards._http import OverHttp, shown

if TYPE_CHECKING:
    import httpx

    from posttrain.reward import Scorer


class Remote(OverHttp):
    """The scores, with their details, of the reward that a server at ``url`` has.

    What the recipe says of it (``name``, ``better``, ``lowest``, ``highest``) is compared with what the
    server says before anything is scored.
    """

    type: Literal["remote"] = "remote"
    range: ClassVar = (-float("inf"), float("inf"))

    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    """The reward that the server has; what its scores are called here too."""
    better: Literal["higher", "lower"] = "higher"
    """Which scores are good ones."""
    lowest: float | None = None
    """The server's lowest possible score must not be below; by default it may be any."""
    highest: float | None = None
    """The server's highest possible score must not be above; by default it may be any."""
    batch_size: int = Field(16, ge=1)
    """Images in one request."""

    @property
    def label(self) -> str:
        return self.name

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]  # a fact of the class elsewhere
        return self.better == "higher"

    def load(self, device: torch.device) -> Scorer:
        del device  # the server has its own
        client, base = self.client(), self.url.rstrip("/")
        self.asked(lambda: client.get(f"{base}/health"), f"{base}/health", self._verified)

        def some(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            from posttrain.scoring.server.wire import packed, scores_of

            body, url = packed(images, prompts, metadata), f"{base}/score"

            def read(response: httpx.Response) -> Scores:
                try:
                    return scores_of(response.json(), len(prompts))
                except ValueError as error:  # of JSON too; another program answers, or another version
                    raise RewardError(f"{url}: not scores: {error} (got {shown(response)!r})") from error

            return self.asked(lambda: client.post(url, content=body), url, read)

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            size = self.batch_size
            parts = [
                some(images[i : i + size], prompts[i : i + size], metadata[i : i + size])
                for i in range(0, len(prompts), size)
            ]
            names = parts[0].details if parts else ()
            return Scores(
                torch.cat([part.value for part in parts]),
                {name: torch.cat([part.details[name] for part in parts]) for name in names},
            )

        return score

    def _verified(self, response: httpx.Response) -> None:
        try:
            said = response.json()
            name, higher, (low, high) = said["name"], said["higher_is_better"], said["range"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(f"{self.url}: no reward server (got {shown(response)!r})") from error
        if name != self.name:
            raise RewardError(f"{self.url} has the reward {name!r}; the recipe says name: {self.name}")
        if higher is not self.higher_is_better:
            actual = "higher" if higher else "lower"
            raise RewardError(
                f"{self.url}: {actual} scores are better; the recipe says better: {self.better}"
            )
        infinity = float("inf")
        low, high = -infinity if low is None else low, infinity if high is None else high
        if (self.lowest is not None and low < self.lowest) or (
            self.highest is not None and high > self.highest
        ):
            raise RewardError(
                f"{self.url}: scores lie in {low:g} to {high:g}; the recipe says lowest: {self.lowest}, "
                f"highest: {self.highest}"
            )
