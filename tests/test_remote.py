"""A reward behind HTTP gives the scores that it gives in this process, or one clear error."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from remote_rewards import CPU, THREE, own, remote, same, scenes
from runs import recipe, run_quietly, stage
from servers import Quiet, ended, running, serving, until

from posttrain.distributed.launch import _free_port
from posttrain.errors import NotFinite, PosttrainError, RecipeError, RewardError
from posttrain.recipe.file import chosen_rewards, evaluation_settings
from posttrain.reward import Scores, checked
from posttrain.rewards._link import Link, NoAnswer
from posttrain.rewards.callable import Callable
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.rewards.remote import Remote
from posttrain.rewards.shapes import Shapes
from posttrain.scoring.server.answers import answer, scores_of
from posttrain.scoring.server.listen import check_exposure
from posttrain.scoring.server.wire import packed, unpacked

ROOT = Path(__file__).parent.parent


def test_scores_and_details_equal_those_in_process_bit_for_bit():
    images, prompts, rows = scenes(12)
    expected = Shapes().load(CPU)(images, prompts, rows)
    assert len(expected.value.unique()) > 2
    with running(Shapes()) as url:
        same(remote(url, batch_size=5).load(CPU)(images, prompts, rows), expected)


def test_every_bit_of_the_images_arrives(monkeypatch):
    def judge(images, prompts, metadata):
        return [float(image.double().sum()) for image in images]

    reward = own(monkeypatch, judge)
    images = torch.rand(7, 3, 8, 24, generator=torch.manual_seed(1))
    expected = reward.load(CPU)(images, [""] * 7, [{}] * 7)
    with running(reward) as url:
        same(remote(url, "judge").load(CPU)(images, ["ä\n\"'"] * 7, [{}] * 7), expected)


def test_what_is_packed_comes_out_unchanged():
    images = torch.randn(2, 3, 4, 5)
    prompts, rows = ["ä \U0001f600", ""], [{"include": [{"class": "x", "count": 2}]}, {}]
    back, texts, metadata = unpacked(bytearray(packed(images.requires_grad_(), prompts, rows)))
    assert torch.equal(back, images)
    assert (texts, metadata) == (prompts, rows)
    scores = Scores(torch.tensor([1 / 3, -1e-30]), {"x": torch.tensor([0.1, 1e30])})
    same(scores_of(json.loads(json.dumps(answer(scores))), 2), scores)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"garbage", "not a safetensors file"),
        (b"", "not a safetensors file"),
        (packed(torch.zeros(2, 3, 4, 4), ["a"], [{}]), "2 images, 1 prompts and 1 rows do not match"),
        (packed(torch.zeros(1, 1, 4, 4), ["a"], [{}]), r"images must be \(n, 3, h, w\) float32"),
        (packed(torch.zeros(1, 3, 4, 4), [1], [{}]), "prompts must be a list of texts"),
        (packed(torch.zeros(0, 3, 4, 4), [], []), "images must be"),
    ],
)
def test_a_request_that_is_none_is_refused_in_words(body, words):
    with pytest.raises(ValueError, match=words):
        unpacked(bytearray(body))


class Faulty(Quiet):
    """Answers /health as shapes would, and /score as ``script`` says, one item a request."""

    def do_GET(self):
        self.reply({"name": "shapes", "range": [None, 1.0], "higher_is_better": True})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.given = self.given_up[0]
        action = self.script.pop(0) if self.script else "right"
        self.seen.append(self.path)
        if callable(action):
            action(self)
        else:
            self.reply(
                {"value": [0.25] * 3, "details": {"strict": [1.0] * 3}} if action == "right" else action
            )


@pytest.fixture
def faulty(monkeypatch):
    """The server, on which only the faults that wait for the end of a time limit meet one."""

    class Handler(Faulty):
        script, seen, given_up = [], [], [threading.Event()]

    request = Link.request

    def limited(link, method, url, **body):
        """The next request is made when the server has seen this one, and knows that it was given up."""
        script, count, Handler.given_up[0] = Handler.script, len(Handler.seen), threading.Event()
        link.seconds = 0.25 if method == "POST" and script and script[0] in (hang, late) else 60
        try:
            return request(link, method, url, **body)
        except NoAnswer:
            until(lambda: method == "GET" or len(Handler.seen) > count)
            raise
        finally:
            Handler.given_up[0].set()

    monkeypatch.setattr(Link, "request", limited)
    with serving(Handler) as Handler.url:
        yield Handler


def hang(handler):
    handler.given.wait(60)
    handler.close_connection = True


def cut(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    handler.close_connection = True


def late(handler):
    handler.given.wait(60)
    handler.reply({"value": [9.0] * 3})


def status(code):
    return lambda handler: handler.reply({"error": f"a reason for {code}"}, code)


@pytest.mark.parametrize("fault", [hang, cut, late, *map(status, (500, 503, 429, 408))])
def test_a_fault_that_passes_is_asked_again(faulty, fault):
    score = remote(faulty.url).load(CPU)
    faulty.script += [fault, fault]
    assert score(*THREE).value.tolist() == [0.25] * 3
    assert len(faulty.seen) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (hang, "asked 3 times in .*, the last time: no answer within 0.25 s"),
        (cut, "asked 3 times in .*, the last time: "),
        (status(502), "asked 3 times in .*, the last time: status 502: .*a reason for 502"),
    ],
)
def test_a_fault_that_stays_is_an_error_after_the_retries(faulty, fault, words):
    score = checked("shapes", remote(faulty.url).load(CPU))
    faulty.script += [fault] * 9
    with pytest.raises(RewardError, match=rf"'shapes' failed.*{faulty.url}/score: {words}"):
        score(*THREE)
    assert len(faulty.seen) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"value": [1.0, 2.0]}, "value: 2 numbers for 3 images"),
        ({"value": [1.0, "good", 2.0]}, "'good' is no number"),
        ({"value": [1.0, True, 2.0]}, "True is no number"),
        ({"value": [1.0, False, 2.0]}, "False is no number"),
        ({"value": [1.0, None, 2.0]}, "None is no number"),
        ({"value": [1.0, 10**400, 2.0]}, "too large"),
        ({"value": [1.0] * 3, "details": {"x": [1.0]}}, "details.x: 1 numbers for 3 images"),
        ({"values": [1.0] * 3}, "no list 'value'"),
        (["x"], "no list 'value'"),
        (lambda handler: handler.reply(b"<html>login</html>"), "not scores: .*login"),
        (status(400), "status 400: .*a reason for 400"),
        (status(404), "status 404"),
        (lambda handler: handler.reply(b"", 302, Location="/elsewhere"), "status 302"),
    ],
)
def test_an_answer_that_is_no_score_is_an_error_at_once(faulty, fault, words):
    score = remote(faulty.url).load(CPU)
    faulty.script += [fault]
    with pytest.raises(RewardError, match=rf"{faulty.url}/score: .*{words}"):
        score(*THREE)
    assert len(faulty.seen) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "ocr"}, "has the reward 'shapes'; the recipe says name: ocr"),
        ({"better": "lower"}, "higher scores are better; the recipe says better: lower"),
        ({"lowest": 0.25}, "scores lie in 0 to 1; the recipe says lowest: 0.25"),
        ({"highest": 0.5}, "highest: 0.5"),
    ],
)
def test_what_the_recipe_says_is_compared_with_the_server(settings, words):
    with running(Shapes()) as url:
        with pytest.raises(RewardError, match=words):
            remote(url, **settings).load(CPU)
        remote(url, highest=1).load(CPU)


def test_another_program_and_no_program_at_the_address_are_told(faulty):
    faulty.do_GET = lambda self: self.reply(b"<html>")
    with pytest.raises(RewardError, match=f"{faulty.url}: no reward server"):
        remote(faulty.url).load(CPU)
    with running(Shapes(), port=_free_port()) as url:
        pass
    with pytest.raises(RewardError, match=f"{url}/health: asked 3 times in .* refused"):
        remote(url).load(CPU)


def test_a_reward_that_fails_on_the_server_is_told_in_its_words():
    with (
        running(Shapes()) as url,
        pytest.raises(RewardError, match=r"status 422: .*no GenEval metadata"),
    ):
        remote(url).load(CPU)(*THREE)


@pytest.mark.parametrize("score", [float("nan"), 1e60], ids=["nan", "too-large"])
def test_scores_that_are_not_finite_are_told_with_their_places_as_in_process(monkeypatch, faulty, score):
    """A run then refuses the step, and goes on."""
    own(monkeypatch, lambda images, prompts, metadata: torch.tensor([row["score"] for row in metadata]))
    rows = [{"score": value} for value in (0.5, 0.25, 0.75, score, 0.5)]
    images = torch.rand(5, 3, 8, 8)
    with running(Callable(function="served:judge")) as url:
        ask = checked("judge", remote(url, "judge", batch_size=2).load(CPU))
        with pytest.raises(
            NotFinite, match=r"'judge' .*/score: status 422: .*(nan|inf) for prompt 'd'"
        ) as error:
            ask(images, list("abcde"), rows)
    assert error.value.positions == [3]
    faulty.script += [{"value": [1.0, 2.0, score]}]
    with pytest.raises(NotFinite, match=r"returned (nan|inf) for prompt") as error:
        checked("shapes", remote(faulty.url).load(CPU))(*THREE)
    assert error.value.positions == [2]


@pytest.mark.parametrize("places", [[3], [-1], [True], ["0"], [], 0, None])
def test_a_refusal_that_names_no_image_of_the_request_is_an_error(faulty, places):
    faulty.script += [lambda handler: handler.reply({"error": "so", "not_finite": places}, 422)]
    with pytest.raises(RewardError, match="status 422") as error:
        checked("shapes", remote(faulty.url).load(CPU))(*THREE)
    assert not isinstance(error.value, NotFinite)


def test_a_server_that_comes_back_is_found_again():
    images, prompts, rows = scenes(2)
    with running(Shapes(), port=_free_port()) as url:
        score = remote(url, retries=9, backoff_seconds=0.05).load(CPU)
        expected = score(images, prompts, rows)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(score, images, prompts, rows)
        time.sleep(0.1)
        assert not waiting.done()
        with running(Shapes(), port=int(url.rpartition(":")[2])):
            same(waiting.result(), expected)


def test_another_reward_at_the_address_of_one_that_ended_is_noticed():
    with running(Shapes(), port=_free_port()) as url:
        score = remote(url).load(CPU)
        score(*scenes(2))
    with (
        running(JpegIncompressibility(), port=int(url.rpartition(":")[2])),
        pytest.raises(
            RewardError, match="has the reward 'jpeg_incompressibility'; the recipe says name: sha"
        ),
    ):
        score(*scenes(2))


def test_no_message_shows_the_password_of_an_address(faulty, caplog):
    url = faulty.url.replace("://", "://me:se@cret@")
    score, host = remote(url).load(CPU), faulty.url.removeprefix("http://")

    def told(ask):
        with pytest.raises(RewardError) as error:
            ask()
        assert host in str(error.value)
        assert "cret" not in str(error.value)

    for fault in (status(503), status(400), {"value": [1.0]}, {"name": "ocr", "value": [0.5] * 3}):
        faulty.script[:] = [fault] * 3
        told(lambda: score(*THREE))
    told(lambda: remote(url, better="lower").load(CPU))
    told(lambda: remote(url, lowest=0.0).load(CPU))
    told(lambda: remote(url, name="ocr").load(CPU))
    assert f"{host}/score: status 503" in caplog.text
    assert "cret" not in caplog.text


def test_without_the_token_nothing_is_told_and_nothing_is_scored(monkeypatch):
    monkeypatch.setenv("GIVEN", "secret")
    monkeypatch.setenv("WRONG", "secre")
    with running(Shapes(), token="secret") as url:
        remote(url, token_env="GIVEN").load(CPU)(*scenes(1))
        for settings in ({}, {"token_env": "WRONG"}):
            with pytest.raises(RewardError, match="status 401"):
                remote(url, **settings).load(CPU)
        assert (
            httpx.post(f"{url}/score", content=packed(*THREE), trust_env=False, timeout=60).status_code == 401
        )
    assert "no environment variable 'ABSENT'" in remote(url, token_env="ABSENT").problem()
    assert remote(url, token_env="GIVEN").problem() is None


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with running(Shapes()) as url:
        remote(url, retries=0).load(CPU)


def test_a_request_that_is_too_large_or_of_unknown_length_is_refused_unread():
    with running(Shapes(), max_bytes=10_000) as url:
        with pytest.raises(RewardError, match=r"status 413: .*at most 10000 are taken \(--max-mb\)"):
            remote(url).load(CPU)(*scenes(1))
        assert (
            httpx.post(f"{url}/score", content=iter([b"x"]), trust_env=False, timeout=60).status_code == 411
        )
        assert httpx.post(f"{url}/score", content=b"x", trust_env=False, timeout=60).status_code == 400


def test_uploads_that_break_off_leave_nothing_behind(caplog):
    body = packed(*THREE)
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    reward = JpegIncompressibility()
    with running(reward, max_bytes=len(body)) as url:
        for _ in range(9):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as upload:
                upload.sendall(head + body[: len(body) // 2])
        score = remote(url, "jpeg_incompressibility", retries=9, backoff_seconds=0.05).load(CPU)
        same(score(*THREE), reward.load(CPU)(*THREE))
    assert "Traceback" not in caplog.text


def test_a_server_is_not_open_to_the_network_without_a_token():
    check_exposure("127.0.0.1", None)
    check_exposure("0.0.0.0", "secret")
    with pytest.raises(PosttrainError, match=r"--host 0\.0\.0\.0 is open to the network"):
        check_exposure("0.0.0.0", None)


def test_a_recipe_names_a_remote_reward():
    (reward,) = chosen_rewards(["remote"], ["url=http://127.0.0.1:1", "name=hpsv2", "better=lower"])
    assert (reward.label, reward.higher_is_better) == ("hpsv2", False)
    assert remote("http://x").higher_is_better
    with pytest.raises(RecipeError, match="url"):
        chosen_rewards(["remote"], ["url=ftp://x", "name=a"])


def test_a_run_learns_the_same_from_a_remote_reward_and_stops_when_it_is_gone(tmp_path):
    grpo = "{type: flow_grpo, group_size: 4, num_steps: 2, guidance_scale: 1.0, noise_level: 0.5}"
    train = "{steps: 2, batch_size: 8, micro_batch: 8, learning_rate: 1e-2, log_every: 1, sample_every: null}"

    def of(rewards):
        made = stage("grpo", grpo, train, rewards=rewards)
        prompts = "{prompts: {type: shapes, count: 12}, resolution: 16}"
        return recipe(made.replace("{type: shapes, images: 10, seed: 1}", prompts))

    def learned(folder):
        (file,) = (folder / "grpo" / "final").rglob("*transformer*/*.safetensors")
        return file.read_bytes()

    run_quietly(of("jpeg_incompressibility"), tmp_path / "here")
    block = "{remote: {url: 'URL', name: jpeg_incompressibility, retries: 1, backoff_seconds: 0}}"
    with running(JpegIncompressibility(), port=_free_port()) as url:
        run_quietly(of(block.replace("URL", url)), tmp_path / "there")
    assert learned(tmp_path / "here") == learned(tmp_path / "there")
    with pytest.raises(RewardError, match=f"{url}/health: asked 2 times"):
        run_quietly(of(block.replace("URL", url)), tmp_path / "gone")


def test_the_command_serves_until_it_is_ended(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SECRET": "s"}
    command = [sys.executable, "-m", "posttrain", "serve-reward", "shapes"]
    command += ["--port", "0", "--token-env", "SECRET"]
    images, prompts, rows = scenes(2)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            name, url = server.stdout.readline().split()
            assert name == "shapes:"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SECRET", "s")
                score = remote(url, token_env="SECRET").load(CPU)
            same(score(images, prompts, rows), Shapes().load(CPU)(images, prompts, rows))
            reward = (
                Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="utf-8").split()[-1]
            )
        finally:
            server.kill()
        server.wait()
        until(lambda: ended(reward))
        with pytest.raises(RewardError, match=f"{url}/score: asked 3 times"):
            score(images, prompts, rows)


def test_an_evaluation_takes_the_settings_of_a_reward_that_it_names(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    named = ["rewards.0.url=http://127.0.0.1:9", "rewards.0.name=shapes"]
    evaluation = evaluation_settings(None, None, str(tmp_path / "p.txt"), ["remote"], named)
    assert evaluation.rewards == [Remote(url="http://127.0.0.1:9", name="shapes")]
