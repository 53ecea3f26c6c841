"""Sends requests to reward servers, and sends failed requests again.

A request is sent again, after waits that double, if the connection fails or times out, if the status is 429
or 5xx, or if the reader of the answer raises ValueError. Any other status of an error is final.
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
MAX_WAIT_SECONDS = 30.0
SHOWN_CHARACTERS = 200
"""An error shows this much of a server's answer."""


class OverHttp(Reward, ABC):
    """A reward that asks a server for its scores."""

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
    """The address below which the server answers, with http:// or https://: ``http://HOST:8400`` for
    ``posttrain serve-reward``, ``http://HOST:8000/v1`` for a server of OpenAI's protocol."""
    token_env: str | None = None
    """The environment variable with the server's bearer token. By default no token is sent."""
    timeout_seconds: float = Field(120.0, gt=0)
    """A request fails if the server sends nothing for this long."""
    retries: int = Field(6, ge=0)
    """How often a failed request is sent again."""
    backoff_seconds: float = Field(0.5, ge=0)
    """The wait before the first retry. Each further wait is twice as long, up to 30 seconds."""

    def problem(self) -> str | None:
        if (reason := super().problem()) is not None:
            return reason
        if self.token_env is not None and not os.environ.get(self.token_env):
            return f"token_env: there is no environment variable {self.token_env!r}, or it is empty"
        return None

    def client(self) -> httpx.Client:
        """A client that sends the token, and ignores proxies set in the environment."""
        import httpx

        headers = {}
        if self.token_env is not None:
            if not (token := os.environ.get(self.token_env)):
                raise RewardError(f"{self.type}: {self.problem()}")
            headers["Authorization"] = f"Bearer {token}"
        return httpx.Client(timeout=self.timeout_seconds, headers=headers, trust_env=False)

    def asked(self, send: Callable[[], httpx.Response], url: str, read: Callable[[httpx.Response], T]) -> T:
        """Call ``send``, again after failures, and return what ``read`` makes of the response.

        Raises RewardError, which names ``url``, if the server refuses the request or all retries fail.
        """
        import httpx

        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff_seconds * 2 ** (attempt - 1), MAX_WAIT_SECONDS))
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
            refusal = f"status {response.status_code}: {excerpt(response)}"
            if response.status_code == 429 or response.status_code >= 500:
                reason = refusal
                continue
            if not response.is_success:
                raise RewardError(f"{url}: {refusal}")
            try:
                return read(response)
            except ValueError as error:
                reason = str(error)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise RewardError(f"{url}: asked {times}, the last time: {reason}")


def excerpt(response: httpx.Response) -> str:
    """The beginning of the response's text, on one line."""
    text = " ".join(response.text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
