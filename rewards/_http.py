"""Asks reward servers, and asks again after failures that may pass.

A request is sent again, after waits that double, if the connection fails or the answer is late, if the status
is 408, 429 or 5xx, or if the reader of the answer raises ValueError. Any other status of an error is final.
"""

from __future__ import annotations

import logging
import time
from abc import ABC
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from posttrain.errors import RewardError
from posttrain.registry import FREE
from posttrain.reward import Reward
from posttrain.rewards._link import Answer, BadAnswer, Link, NoAnswer
from posttrain.support.tokens import token_in, token_problem
from posttrain.support.wording import without_logins

T = TypeVar("T")
log = logging.getLogger(__name__)
MAX_WAIT_SECONDS = 30.0
PASSING = (408, 429)
"""Statuses below 500 that may pass: the request arrived too slowly, or one of too many."""


class Refused(RewardError):
    """A server refuses a request, and would the next time; ``answer`` is what it said."""

    def __init__(self, message: str, answer: Answer) -> None:
        super().__init__(message)
        self.answer = answer


class OverHttp(Reward, ABC):
    """A reward that asks a server for its scores."""

    requires: ClassVar = ("httpx",)

    url: Annotated[str, FREE] = Field(pattern=r"^https?://[^\s/]\S*$", examples=["http://127.0.0.1:8000"])
    """The address below which the server answers, with http:// or https://: ``http://HOST:8400`` for
    ``posttrain serve-reward``, ``http://HOST:8000/v1`` for a server of OpenAI's protocol."""
    token_env: Annotated[str | None, FREE] = None
    """The environment variable with the server's bearer token. By default no token is sent."""
    timeout_seconds: Annotated[float, FREE] = Field(default=120.0, gt=0, le=86_400)
    """A request fails if its whole answer is not here within this time."""
    retries: Annotated[int, FREE] = Field(default=6, ge=0, le=1000)
    """How often a failed request is sent again."""
    backoff_seconds: Annotated[float, FREE] = Field(default=0.5, ge=0, le=3600)
    """The wait before the first retry. Each further wait is twice as long, up to 30 seconds."""

    def problem(self) -> str | None:
        if (reason := super().problem()) is not None:
            return reason
        if self.token_env is not None and (reason := token_problem(self.token_env)) is not None:
            return f"token_env: {reason}"
        return None

    def link(self) -> Link:
        """A link that sends the token, and ignores proxies set in the environment."""
        headers = {}
        if self.token_env is not None:
            if (reason := token_problem(self.token_env)) is not None:
                raise RewardError(f"{self.type}: token_env: {reason}")
            headers["Authorization"] = f"Bearer {token_in(self.token_env)}"
        return Link(headers, self.timeout_seconds)

    def asked(self, link: Link, method: str, url: str, read: Callable[[Answer], T], **body: Any) -> T:
        """Send a request with httpx's ``body``, again after failures; return what ``read`` makes of it.

        Raises RewardError, which names ``url`` without a password in it: Refused if the server refuses the
        request, or another if all retries fail. Its cause is what ``read`` raised of the last answer, if
        there was one.
        """
        reason, began, shown = "", time.monotonic(), without_logins(url)
        unread: ValueError | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                log.warning("%s: %s. It is asked again, %d of %d times", shown, reason, attempt, self.retries)
                time.sleep(min(self.backoff_seconds * 2 ** (attempt - 1), MAX_WAIT_SECONDS))
            unread = None
            try:
                answer = link.request(method, url, **body)
            except NoAnswer as error:
                reason = str(error)
                continue
            except BadAnswer as error:
                raise RewardError(f"{shown}: {error}") from error
            refusal = f"status {answer.status}: {answer.excerpt()}"
            if answer.status in PASSING or answer.status >= 500:
                reason = refusal
                continue
            if not 200 <= answer.status < 300:
                raise Refused(f"{shown}: {refusal}", answer)
            try:
                return read(answer)
            except ValueError as error:
                reason, unread = str(error), error
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        seconds = time.monotonic() - began
        raise RewardError(f"{shown}: asked {times} in {seconds:.1f} s, the last time: {reason}") from unread
