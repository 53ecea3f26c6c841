"""Asks a server, started by ``posttrain serve-reward``, for the scores of its reward.

Images are sent as float32, so the scores equal those of the same reward in this process, bit for bit. If the
server scores several requests in one batch, a network's last bits may differ, as with any other batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.errors import RewardError
from posttrain.reward import Scores
from posttrain.rewards._http import OverHttp, excerpt

if TYPE_CHECKING:
    import httpx

    from posttrain.reward import Scorer


class Remote(OverHttp):
    """The scores and details of the reward that the server at ``url`` serves.

    Before anything is scored, ``name``, ``better``, ``lowest`` and ``highest`` are compared with the server's
    reward.
    """

    type: Literal["remote"] = "remote"
    range: ClassVar = (-float("inf"), float("inf"))

    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    """The name of the server's reward, and of the scores here."""
    better: Literal["higher", "lower"] = "higher"
    """Whether higher or lower scores are better."""
    lowest: float | None = None
    """The server's lowest possible score must not be lower than this. By default it is not checked."""
    highest: float | None = None
    """The server's highest possible score must not be higher than this. By default it is not checked."""
    batch_size: int = Field(16, ge=1)
    """Images in one request."""

    @property
    def label(self) -> str:
        return self.name

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]  # other rewards have it on the class
        return self.better == "higher"

    def load(self, device: torch.device) -> Scorer:
        del device  # the server has its own
        client, base = self.client(), self.url.rstrip("/")
        self.asked(lambda: client.get(f"{base}/health"), f"{base}/health", self._check_server)

        def ask(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            from posttrain.scoring.server.wire import packed, scores_of

            body, url = packed(images, prompts, metadata), f"{base}/score"

            def read(response: httpx.Response) -> Scores:
                try:
                    return scores_of(response.json(), len(prompts))
                except ValueError as error:  # also if the answer is not JSON
                    raise RewardError(f"{url}: not scores: {error} (got {excerpt(response)!r})") from error

            return self.asked(lambda: client.post(url, content=body), url, read)

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            size = self.batch_size
            batches = [
                ask(images[i : i + size], prompts[i : i + size], metadata[i : i + size])
                for i in range(0, len(prompts), size)
            ]
            names = batches[0].details if batches else ()
            return Scores(
                torch.cat([batch.value for batch in batches]),
                {name: torch.cat([batch.details[name] for batch in batches]) for name in names},
            )

        return score

    def _check_server(self, response: httpx.Response) -> None:
        """Raise RewardError if the server's reward is not the one that the recipe describes."""
        try:
            health = response.json()
            name, higher, (low, high) = health["name"], health["higher_is_better"], health["range"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(f"{self.url}: no reward server (got {excerpt(response)!r})") from error
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
