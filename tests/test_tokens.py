"""A token of a reward server is sent as it was meant, and no message shows it."""

import pytest
from typer.testing import CliRunner

from posttrain.cli.app import app
from posttrain.errors import PosttrainError, RewardError
from posttrain.rewards.remote import Remote

REWARD = Remote(url="http://127.0.0.1:1", name="shapes", token_env="SECRET")


def served():
    arguments = ["serve-reward", "shapes", "--port", "0", "--token-env", "SECRET"]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_line_end_of_a_file_of_secrets_is_no_part_of_the_token(monkeypatch):
    monkeypatch.setenv("SECRET", "abc123 \n")
    assert REWARD.problem() is None
    assert REWARD.link()._client.headers["Authorization"] == "Bearer abc123"


@pytest.mark.parametrize("token", ["abc\n123", "\u00e4bc123", " \n", "abc\x1b123"])
def test_what_cannot_be_sent_is_refused_and_not_shown(monkeypatch, token):
    monkeypatch.setenv("SECRET", token)
    messages = [str(REWARD.problem())]
    with pytest.raises(RewardError, match="remote: token_env: ") as refused:
        REWARD.link()
    messages.append(str(refused.value))
    with pytest.raises(PosttrainError, match="--token-env: ") as refused:
        served()
    messages.append(str(refused.value))
    assert [message for message in messages if "'SECRET'" not in message or "bc" in message] == []
