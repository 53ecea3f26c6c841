"""A judge behind a chat server is asked rightly, and only a reply that is a score is read as one."""

import base64
import io
import json
import threading
import time

import pytest
import torch
from PIL import Image
from servers import Quiet, serving

from posttrain.errors import NotFinite, RewardError
from posttrain.reward import checked
from posttrain.rewards._link import Answer
from posttrain.rewards.unifiedreward import UnifiedReward, score_in

CPU = torch.device("cpu")


def completion(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def judge():
    """A chat server whose replies are what ``judge.reply(prompt, pixel)`` returns; it keeps what it is sent."""

    class Handler(Quiet):
        seen, busy, most, lock = [], 0, 0, threading.Lock()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kind = type(self)
            with kind.lock:
                kind.seen.append((self.path, self.headers, body))
                kind.busy += 1
                kind.most = max(kind.most, kind.busy)
            picture, words = body["messages"][0]["content"]
            data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
            image = Image.open(io.BytesIO(data))
            assert image.format == "PNG"
            answer = kind.reply(words["text"], image)
            with kind.lock:
                kind.busy -= 1
            if isinstance(answer, int):
                return self.reply_status(answer)
            return Quiet.reply(self, completion(answer) if isinstance(answer, str) else answer)

        def reply_status(self, code):
            Quiet.reply(self, {"error": f"a reason for {code}"}, code)

        @staticmethod
        def reply(text, image):
            return "Final Score: 3"

    with serving(Handler) as address:
        Handler.url = f"{address}/v1"
        yield Handler


def unified(judge, **settings):
    quick = {"timeout_seconds": 60.0, "retries": 2, "backoff_seconds": 0.01}
    return UnifiedReward(url=judge.url, **{**quick, **settings})


def grey(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 64, 48).clone()


def test_each_image_gets_the_score_of_its_own_reply(judge):
    levels, two = [0.2, 0.4, 0.6, 0.8, 1.0] * 4, threading.Barrier(2)

    def reply(text, image):
        two.wait(60)  # so that two are judged at a time, on a slow machine as well
        assert image.size == (512, 512)
        level = image.getpixel((0, 0))[0]
        time.sleep(0.002 * (level % 7))  # replies come in another order than the questions
        return f"It shows {text[-9:]}.\nFinal Score: {level / 51:.1f}"

    judge.reply = staticmethod(reply)
    found = unified(judge).load(CPU)(grey(*levels), [f"caption {i}" for i in range(20)], [{}] * 20)
    torch.testing.assert_close(found.value, torch.tensor(levels), rtol=0, atol=1e-6)
    assert found.details == {}
    assert 1 < judge.most <= 8


def test_the_request_is_what_chat_servers_take(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    reward = unified(judge, token_env="JUDGE_TOKEN", model="judge-7b")
    reward.load(CPU)(grey(0.5), ["a {prompt} of 5 {braces}"], [{}])
    ((path, headers, body),) = judge.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("judge-7b", 0)
    assert body["messages"][0]["content"][1]["text"].endswith("Caption: a {prompt} of 5 {braces}")
    unified(judge, question="{prompt}?").load(CPU)(grey(0.5), ["x"], [{}])
    assert judge.seen[1][2]["messages"][0]["content"][1]["text"] == "x?"
    with pytest.raises(ValueError, match="question"):
        unified(judge, question="Is it good?")


def test_no_more_than_so_many_are_judged_at_a_time(judge):
    two = threading.Barrier(2)

    def reply(text, image):
        two.wait(60)
        time.sleep(0.02)
        return "Final Score: 2"

    judge.reply = staticmethod(reply)
    found = unified(judge, concurrency=2).load(CPU)(grey(*[0.5] * 8), ["a"] * 8, [{}] * 8)
    assert found.value.tolist() == pytest.approx([0.4] * 8)
    assert judge.most == 2


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4),
        ("Final Score:4.5", 4.5),
        ("Final Score: 4.", 4),
        ("Final Score: 4, because", 4),
        ("Final Score: 4/5", 4),
        ("Final Score: 3.25 / 5.", 3.25),
        ("**Final Score:** 2", 2),
        ("final score: [5]", 5),
        ("Final Score: 1.0\n", 1),
        ("The form is 'Final Score: 3'. Final Score: 2", 2),
    ],
)
def test_a_score_is_read(text, score):
    assert score_in(Answer(200, json.dumps(completion(text)).encode())) == score


@pytest.mark.parametrize(
    "text",
    [
        "Final Score: 45",
        "Final Score: 4.5.1",
        "Final Score: 4/10",
        "Final Score: 4 / 50",
        "Final Score: 4/5.5",
        "Final Score: 5.5",
        "Final Score: 0",
        "Final Score: -4",
        "Final Score: 9",
        "Final Score: 3,75",
        "Final Score: four",
        "Score: 4",
        "",
        None,
    ],
)
def test_what_is_no_score_is_not_read_as_one(text):
    with pytest.raises(ValueError, match="no 'Final Score:' of 1 to 5"):
        score_in(Answer(200, json.dumps(completion(text)).encode()))


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[" * 100_000]
)
def test_what_is_no_reply_is_not_read(body):
    with pytest.raises(ValueError, match="not a chat completion"):
        score_in(Answer(200, body))


@pytest.mark.parametrize("fault", ["I cannot tell.", "Final Score: 45", 500, 429, {"choices": []}])
def test_a_reply_without_a_score_is_asked_for_again_and_then_an_error(judge, fault):
    script = [fault, fault]
    judge.reply = staticmethod(lambda text, image: script.pop() if script else "Final Score: 5")
    score = checked("unifiedreward", unified(judge).load(CPU))
    assert score(grey(0.5), ["a"], [{}]).value.tolist() == [1.0]
    assert len(judge.seen) == 3
    script += [fault] * 9
    with pytest.raises(
        RewardError, match=f"'unifiedreward' (failed|has no).*{judge.url}/chat/completions: asked 3 times"
    ) as error:
        score(grey(0.5), ["a"], [{}])
    assert isinstance(error.value, NotFinite) == isinstance(fault, str)
    assert len(judge.seen) == 6


def test_images_whose_replies_have_no_score_are_named_and_the_others_are_judged(judge):
    judge.reply = staticmethod(lambda text, image: "Final Score: 5" if text.endswith("good") else "Sorry.")
    score = checked("unifiedreward", unified(judge, retries=1, concurrency=1).load(CPU))
    with pytest.raises(NotFinite, match=r"has no score: .*asked 2 times.*in the reply 'Sorry\.'") as error:
        score(grey(*[0.5] * 5), ["good", "bad", "good", "bad", "good"], [{}] * 5)
    assert error.value.positions == [1, 3]
    assert len(judge.seen) == 3 + 2 * 2


def test_a_refusal_is_an_error_at_once_and_ends_the_batch(judge):
    judge.reply = staticmethod(lambda text, image: 401)
    with pytest.raises(RewardError, match=r"status 401: .*a reason for 401"):
        unified(judge, concurrency=1).load(CPU)(grey(*[0.5] * 50), ["a"] * 50, [{}] * 50)
    assert len(judge.seen) == 1


def test_a_judge_that_hangs_is_an_error_that_says_so(judge):
    told = threading.Event()
    judge.reply = staticmethod(lambda text, image: told.wait(60) and "Final Score: 5")
    with pytest.raises(RewardError, match=r"asked 2 times in .*, the last time: no answer within 0\.1 s"):
        unified(judge, timeout_seconds=0.1, retries=1).load(CPU)(grey(0.5), ["a"], [{}])
    told.set()


def test_a_judge_that_hangs_does_not_keep_the_program_from_ending(judge):
    """An end by Ctrl-C would wait for all that is sent again, a quarter of an hour by default."""
    asked, told, before = threading.Event(), threading.Event(), {*threading.enumerate()}
    judge.reply = staticmethod(lambda text, image: asked.set() or (told.wait(60) and "Final Score: 5"))
    score = unified(judge).load(CPU)
    caller = threading.Thread(target=score, args=(grey(0.5), ["a"], [{}]))
    caller.start()
    assert asked.wait(60)
    others = {*threading.enumerate()} - before - {caller}
    told.set()
    caller.join(60)
    assert [thread.name for thread in others if not thread.daemon] == []
