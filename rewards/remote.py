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

from posttrain.errors import NotFinite, RewardError
from posttrain.registry import FREE
from posttrain.reward import Scores
from posttrain.rewards._http import OverHttp, Refused
from posttrain.support.wording import shown, without_logins

if TYPE_CHECKING:
    from posttrain.reward import Scorer
    from posttrain.rewards._link import Answer

INFINITY = float("inf")


class Remote(OverHttp):
    """The scores and details of the reward that the server at ``url`` serves.

    Before anything is scored, ``name``, ``better``, ``lowest`` and ``highest`` are compared with the server's
    reward.
    """

    type: Literal["remote"] = "remote"
    range: ClassVar = (-INFINITY, INFINITY)

    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$", examples=["pickscore"])]
    """The name of the server's reward, and of the scores here."""
    better: Literal["higher", "lower"] = "higher"
    """Whether higher or lower scores are better."""
    lowest: float | None = None
    """The server's lowest possible score must not be lower than this. By default it is not checked."""
    highest: float | None = None
    """The server's highest possible score must not be higher than this. By default it is not checked."""
    batch_size: Annotated[int, FREE] = Field(default=16, ge=1, le=4096)
    """Images in one request."""

    @property
    def label(self) -> str:
        return self.name

    def about(self) -> str:
        return f"The score {self.name} of a reward server."

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]  # other rewards have it on the class
        return self.better == "higher"

    def load(self, device: torch.device) -> Scorer:
        from posttrain.scoring.server.answers import scores_of
        from posttrain.scoring.server.wire import packed

        del device  # the server has its own
        link, base = self.link(), self.url.rstrip("/")
        place = without_logins(base)
        self.asked(link, "GET", f"{base}/health", self._check_server)

        def ask(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:

            def read(answer: Answer) -> Scores:
                try:
                    told = answer.json()
                    scores = scores_of(told, len(prompts))
                except ValueError as error:  # also if the answer is not JSON
                    raise RewardError(
                        f"{place}/score: not scores: {error} (got '{answer.excerpt()}')"
                    ) from error
                self._check_name(told.get("name", self.name))  # servers of others may not say it
                return scores

            body = packed(images, prompts, metadata)
            return self.asked(link, "POST", f"{base}/score", read, content=body)

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            batches = []
            for i in range(0, len(prompts), self.batch_size):
                part = slice(i, i + self.batch_size)
                try:
                    batches.append(ask(images[part], prompts[part], metadata[part]))
                except Refused as error:
                    if places := _not_finite(error.answer, len(prompts[part])):
                        raise NotFinite(str(error), [i + place for place in places]) from error
                    raise
            names = batches[0].details if batches else {}
            if odd := [batch for batch in batches if batch.details.keys() != names.keys()]:
                both = f"{[*names]} and {[*odd[0].details]}"
                raise RewardError(f"{place}: answers have different details: {both}")
            return Scores(
                torch.cat([batch.value for batch in batches]),
                {name: torch.cat([batch.details[name] for batch in batches]) for name in names},
            )

        return score

    def _check_server(self, answer: Answer) -> None:
        """Raise RewardError if the server's reward is not the one that the recipe describes."""
        place = without_logins(self.url)
        try:
            health = answer.json()
            name, higher, (low, high) = health["name"], health["higher_is_better"], health["range"]
            low, high = -INFINITY if low is None else float(low), INFINITY if high is None else float(high)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise RewardError(f"{place}: no reward server (got '{answer.excerpt()}')") from error
        self._check_name(name)
        if higher is not self.higher_is_better:
            actual = "higher" if higher else "lower"
            raise RewardError(f"{place}: {actual} scores are better; the recipe says better: {self.better}")
        if (self.lowest is not None and low < self.lowest) or (
            self.highest is not None and high > self.highest
        ):
            raise RewardError(
                f"{place}: scores lie in {low:g} to {high:g}; the recipe says lowest: {self.lowest}, "
                f"highest: {self.highest}"
            )

    def _check_name(self, name: object) -> None:
        """Raise RewardError if the server's reward has another ``name`` than the recipe says."""
        if name != self.name:
            place = without_logins(self.url)
            raise RewardError(f"{place} has the reward {shown(name)}; the recipe says name: {self.name}")


def _not_finite(refusal: Answer, count: int) -> list[int]:
    """Which of a request's ``count`` images have no finite score, if that is why it was refused."""
    from posttrain.scoring.server.answers import not_finite

    try:
        return not_finite(refusal.json(), count)
    except ValueError:  # another server may answer in another format
        return []
