"""Samples are drawn and scored in order, each by its own prompt, and the weights' signs say what is better."""

import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from servers import until

from posttrain.engine.monitor import Monitor
from posttrain.errors import NotFinite, RewardError
from posttrain.recipe.schema import Evaluation
from posttrain.reward import Scores
from posttrain.rewards.shapes import Shapes
from posttrain.scoring import judge as judges
from posttrain.scoring.batches import draw_and_score, grid_positions, load_scorers, samples_of
from posttrain.scoring.judge import Judge, Verdict
from posttrain.stages.hooks.held_out import HeldOut

CPU = torch.device("cpu")


def reward(label, score, weight=1.0, higher=True):
    """A reward whose scores are ``score(images, prompts, rows)``; it keeps the device it is loaded on."""
    kind = SimpleNamespace(label=label, weight=weight, higher_is_better=higher, loaded=[], limit_minutes=1)
    kind.load = lambda device: (kind.loaded.append(device), score)[1]
    return kind


def lengths(images, prompts, rows):
    return Scores(
        torch.tensor([float(len(p)) for p in prompts]), {"tag": torch.tensor([float(r["n"]) for r in rows])}
    )


def brightness(images, prompts, rows):
    return Scores(images.flatten(1).mean(1).double())


class Grey:
    """Draws the index-th image of a prompt in the grey of the index over 10; it keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def images(self, prompts, indices, settings):
        self.asked.append((prompts, indices, settings))
        return torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 10


def test_samples_are_scored_a_batch_at_a_time_in_order():
    sampler, evaluation = Grey(), SimpleNamespace(batch_size=2)
    rows = [{"prompt": "a", "n": 1, "tag": "t"}, {"prompt": "bb", "n": 2}]
    samples = [(rows[0], 3), (rows[1], 0), (rows[1], 5)]
    scorers = load_scorers([reward("len", lengths), reward("bright", brightness)], CPU)
    parts = list(draw_and_score(sampler, evaluation, samples, scorers))
    assert sampler.asked == [(["a", "bb"], [3, 0], evaluation), (["bb"], [5], evaluation)]
    assert [len(images) for _, images in parts] == [2, 1]
    assert parts[1][1].mean().item() == pytest.approx(0.5)
    assert [r for records, _ in parts for r in records] == [
        {
            "prompt": "a",
            "index": 3,
            "tag": "t",
            "scores": {"len": 1.0, "len/tag": 1.0, "bright": pytest.approx(0.3)},
        },
        {"prompt": "bb", "index": 0, "tag": None, "scores": {"len": 2.0, "len/tag": 2.0, "bright": 0.0}},
        {
            "prompt": "bb",
            "index": 5,
            "tag": None,
            "scores": {"len": 2.0, "len/tag": 2.0, "bright": pytest.approx(0.5)},
        },
    ]


def test_scorers_are_loaded_on_the_device_by_name_and_checked():
    kind = reward("short", lambda images, prompts, rows: Scores(torch.zeros(1)))
    scorers = load_scorers([kind], torch.device("meta"))
    assert kind.loaded == [torch.device("meta")]
    with pytest.raises(RewardError, match="reward 'short' returned value"):
        scorers["short"](torch.zeros(2, 3, 1, 1), ["a", "b"], [{}, {}])


def test_a_prompt_that_comes_again_goes_on_counting():
    a, b, again = {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "tag": "x"}
    assert samples_of([a, b, again], 2) == [(a, 0), (a, 1), (b, 0), (b, 1), (again, 2), (again, 3)]
    assert samples_of([a], 0) == []


def test_first_images_are_shown_by_tag_in_turn():
    tags = ["x", "x", "y", None, "x", None]
    samples = [({"tag": tag} if tag else {}, int(i == 1)) for i, tag in enumerate(tags)]
    order = [0, 2, 3, 4, 5]  # sample 1 is no first image
    assert grid_positions(samples, 9) == {sample: position for position, sample in enumerate(order)}
    assert grid_positions(samples, 3) == {0: 0, 2: 1, 3: 2}
    assert grid_positions(samples, 0) == grid_positions([], 4) == {}


class Halving:
    """Decodes latents to half their values, in bfloat16; it keeps the threads that it decoded in."""

    device = CPU

    def __init__(self):
        self.threads = []

    def decode(self, latents):
        self.threads.append(threading.current_thread())
        return (latents / 2).bfloat16()


def batch(*prompts):
    return SimpleNamespace(metadata=[{"prompt": p, "n": i} for i, p in enumerate(prompts)])


def test_the_weights_are_negative_where_lower_is_better(tmp_path):
    kinds = [reward("a", lengths, 2.0), reward("b", brightness, 0.5, higher=False)]
    with Judge(Halving(), kinds, tmp_path) as judge:
        assert judge.weights == {"a": 2.0, "b": -0.5}
        assert [kind.loaded for kind in kinds] == [[CPU], [CPU]]


def test_a_verdict_has_every_reward_and_detail_as_float32(tmp_path):
    model, seen = Halving(), []

    def bright(images, prompts, rows):
        seen.append((images.dtype, threading.current_thread()))
        return brightness(images, prompts, rows)

    with Judge(model, [reward("len", lengths), reward("bright", bright)], tmp_path / "failures") as judge:
        found = judge.submit(
            torch.tensor([1.0, 0.5]).view(2, 1, 1, 1).expand(2, 3, 2, 2), batch("a", "bcd")
        ).result()
    assert {k: v.tolist() for k, v in found.rewards.items()} == {"len": [1, 3], "bright": [0.5, 0.25]}
    assert {k: v.tolist() for k, v in found.details.items()} == {"len/tag": [0, 1]}
    assert {v.dtype for v in (*found.rewards.values(), *found.details.values())} == {torch.float32}
    assert model.threads == [threading.current_thread()], "decoding is the caller's"
    assert seen[0][0] == torch.float32
    assert seen[0][1].name == "reward bright", "scoring is the reward's"
    assert not (tmp_path / "failures").exists()


def test_verdicts_are_joined_in_order():
    first = Verdict({"a": torch.tensor([1.0])}, {"a/d": torch.tensor([2.0])})
    second = Verdict({"a": torch.tensor([3.0, 4.0])}, {"a/d": torch.tensor([5.0, 6.0])})
    joined = Verdict.cat([first, second])
    assert Verdict.cat([first]).rewards["a"].tolist() == [1]
    assert joined.rewards["a"].tolist() == [1, 3, 4]
    assert joined.details["a/d"].tolist() == [2, 5, 6]


@pytest.mark.parametrize("existing", [True, False])
def test_the_first_failure_keeps_its_images_and_prompts(tmp_path, existing):
    folder = tmp_path / "deep" / "failures"
    if existing:
        folder.mkdir(parents=True)
    with Judge(Halving(), [reward("bad", lambda *_: 1 / 0)], folder) as judge:
        for level in (1.0, 0.0):
            waiting = judge.submit(torch.full((2, 3, 4, 4), level), batch(f"p{level}", "q"))
            with pytest.raises(
                RewardError,
                match=r"(?s)^reward 'bad' failed .*division by zero\n.*\nIts images and prompts are in ",
            ):
                waiting.result()
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert lines == [
        {"image": "0000.png", "prompt": "p1.0", "n": 0},
        {"image": "0001.png", "prompt": "q", "n": 1},
    ]
    assert (np.array(Image.open(folder / "0001.png")) == 128).all(), (
        "0.5 rounds to 128; the first batch's, not the second's"
    )


def test_an_image_that_is_not_finite_is_kept_and_named_by_its_position(tmp_path):
    images = torch.zeros(2, 3, 4, 4)
    images[1] = torch.nan
    with (
        Judge(Halving(), [reward("len", lengths)], tmp_path / "failures") as judge,
        pytest.raises(
            NotFinite,
            match=r"(?s)for prompt 'q' is not finite.*its images and prompts are in '.*failures'\)$",
        ) as caught,
    ):
        judge.submit(images, batch("p", "q")).result()
    assert caught.value.positions == [1]
    assert len(list((tmp_path / "failures").iterdir())) == 3


def test_only_one_batch_is_scored_at_a_time_and_closing_drops_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "CLOSE_SECONDS", 60)
    begun, count = threading.Event(), []

    def slow(images, prompts, rows):
        count.append(prompts[0])
        begun.set()
        until(lambda: judge._worker._closed)
        return Scores(torch.zeros(len(prompts)))

    with Judge(Halving(), [reward("slow", slow)], tmp_path) as judge:
        waiting = [judge.submit(torch.zeros(1, 3, 1, 1), batch(name)) for name in "ab"]
        assert begun.wait(60)
    assert count == ["a"]
    assert waiting[0].done(), "closing waits for the worker"
    assert waiting[1].cancelled()


def test_held_out_scores_load_no_reward_again_that_the_stage_has(tmp_path, monkeypatch):
    loaded = []

    def load(self, device, original=Shapes.load):
        loaded.append(self.score)
        return original(self, device)

    monkeypatch.setattr(Shapes, "load", load)
    stage, account = SimpleNamespace(train=SimpleNamespace(keep_best=None)), SimpleNamespace(readings=[])
    account.read_with = account.best_by = None
    training: Any = SimpleNamespace(run=SimpleNamespace(stage=stage), policy=None, account=account)
    prompts = {"type": "shapes", "count": 2}
    with Judge(Halving(), [Shapes(score="graded", weight=2)], tmp_path) as judge:
        for score in ("graded", "strict"):
            rewards = ["jpeg_compressibility", {"type": "shapes", "score": score}]
            evaluation = Evaluation.model_validate({"prompts": prompts, "rewards": rewards})
            hook: Any = HeldOut(training, Monitor(), evaluation, None, None, judge)  # type: ignore[arg-type]
            assert list(hook._scorers) == ["jpeg_compressibility", "shapes"]
            assert (hook._scorers["shapes"] is judge.scorers["shapes"]) == (score == "graded")
    assert loaded == ["graded", "strict"]
