"""How do rewards that ask a server go on when it fails: what is asked again, and what is an error at once?

Asked again, after waits that double: a connection that fails, a time-out, status 429 and 5xx, and an answer
that its reader refuses with ValueError. What a server refuses (4xx) it would refuse again.
"""

from __future__ import annotations

import os
import time
from abc import ABC
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import Field

from posttrain.errors import RewardError
from posttrain.reward import Reward

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
LONGEST_WAIT = 30.0
SHOWN = 200
"""Characters of a server's answer that an error shows."""


class OverHttp(Reward, ABC):
    """A reward whose scores come from a server."""

    requires: ClassVar = ("httpx",)
    unmeasured: ClassVar = Reward.unmeasured | {
        "url",
        "token_env",
        "timeout_seconds",
        "retries",
        "backoff_seconds",
        "batch_size",
        "concurrency",
    }

    url: str = Field(pattern=r"^https?://[^\s/]\S*$")
    token_env: str | None = None
    """The environment variable that holds the server's bearer token; none is sent by default."""
    timeout_seconds: float = Field(120.0, gt=0)
    """How long the server may be silent before a request counts as failed."""
    retries: int = Field(6, ge=0)
    """How often a request that failed is sent again."""
    backoff_seconds: float = Field(0.5, ge=0)
    """The wait before the first of them; each next one is twice as long, up to half a minute."""

    def problem(self) -> str | None:
        if (words := super().problem()) is not None:
            return words
        if self.token_env is not None and not os.environ.get(self.token_env):
            return f"token_env: there is no environment variable {self.token_env!r}, or it is empty"
        return None

    def client(self) -> httpx.Client:
        """A client that sends the token, and that proxies in the environment do not lead astray."""
        import httpx

        headers = {}
        if self.token_env is not None:
            if not (token := os.environ.get(self.token_env)):
                raise RewardError(f"{self.type}: {self.problem()}")
            headers["Authorization"] = f"Bearer {token}"
        return httpx.Client(timeout=self.timeout_seconds, headers=headers, trust_env=False)

    def asked(self, send: Callable[[], httpx.Response], url: str, read: Callable[[httpx.Response], T]) -> T:
        """What ``read`` makes of the answer to ``send``. Raises RewardError, naming ``url``."""
        import httpx

        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff_seconds * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                response = send()
            except httpx.TimeoutException:
                reason = f"no answer within {self.timeout_seconds:g} s"
                continue
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise RewardError(f"{url}: {error}") from error
            said = f"status {response.status_code}: {shown(response)}"
            if response.status_code == 429 or response.status_code >= 500:
                reason = said
                continue
            if not response.is_success:
                raise RewardError(f"{url}: {said}")
            try:
                return read(response)
            except ValueError as error:
                reason = str(error)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise RewardError(f"{url}: asked {times}, the last time: {reason}")


def shown(response: httpx.Response) -> str:
    """The beginning of an answer, on one line."""
    text = " ".join(response.text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
