"""An evaluation is complete and the same, whatever kills it and however many processes share it."""

import io
import json

import pytest
import torch
from forked import posttrain, start
from PIL import ExifTags, Image
from rich.console import Console

from posttrain.cli.evaluate import _default_name
from posttrain.distributed.environment import rank_and_world_size
from posttrain.errors import PosttrainError, RecipeError, RewardError
from posttrain.evaluation.card import differing
from posttrain.evaluation.compare import compare_table, load, worded
from posttrain.evaluation.compare_page import write_page
from posttrain.evaluation.evaluate import Share, evaluate, evaluate_apart
from posttrain.recipe.schema import Evaluation
from posttrain.recipe.suites import SUITES, published_as, suite_prompts
from posttrain.sampler import Sampler
from posttrain.sampling.latents import prompt_noise
from posttrain.weights.files import hash_of


class NoiseSampler(Sampler):
    """Its images are their own noise, brighter by ``light``; it dies after ``lives`` batches."""

    def __init__(self, lives=None, light=0.0):
        self.device, self.divisor, self.source, self.forward_equivalents = torch.device("cpu"), 8, "noise", 0
        self.settings = {"type": "noise"}
        self.lives, self.light, self.calls = lives, light, 0

    def images(self, prompts, indices, settings):
        if self.lives is not None and self.calls >= self.lives:
            raise KeyboardInterrupt
        self.calls += 1
        self.forward_equivalents += len(prompts)
        pairs = zip(prompts, indices, strict=True)
        noise = torch.stack([prompt_noise(settings.seed, p, i, (3, 16, 16)) for p, i in pairs])
        return (noise.sigmoid() * (1 - self.light) + self.light).clamp(0, 1)

    def fingerprint(self):
        return f"light {self.light}"


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"prompt": f"a photo of {n} cats", "tag": "few" if n < 5 else "many", "include": []} for n in range(7)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return file


def settings(prompts, **changes):
    data = {"prompts": {"type": "file", "path": str(prompts)}, "rewards": ["jpeg_incompressibility"]}
    data |= {"resolution": 16, "batch_size": 3, "images_per_prompt": 2, "grid": 2, **changes}
    return Evaluation.model_validate(data)


WHOLE = Share()


def run(sampler, evaluation, folder, share=WHOLE):
    console = Console(file=io.StringIO())
    return evaluate(sampler, evaluation, folder, name="x", weights="raw", console=console, share=share)


def test_a_killed_evaluation_goes_on_and_gives_the_same(prompts, tmp_path):
    whole = run(NoiseSampler(), settings(prompts), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(NoiseSampler(lives=2), settings(prompts), tmp_path / "cut")
    assert not (tmp_path / "cut" / "eval.json").exists()
    second = NoiseSampler()
    card = run(second, settings(prompts), tmp_path / "cut")
    assert second.calls == 4, "6 batches of 3, of which 2 were done"
    records = (tmp_path / "cut" / "records.jsonl").read_text()
    assert records == (tmp_path / "whole" / "records.jsonl").read_text()
    assert {k: v for k, v in card.items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }
    assert sorted(p.name for p in (tmp_path / "cut").iterdir() if p.name[0] != ".") == [
        "eval.json",
        "grid",
        "records.jsonl",
    ]
    third = NoiseSampler()
    assert run(third, settings(prompts), tmp_path / "cut") == card
    assert third.calls == 0


def test_every_sample_is_counted_once_whoever_measures_it(prompts, tmp_path):
    whole = run(NoiseSampler(), settings(prompts), tmp_path / "whole")
    cards = [
        run(NoiseSampler(), settings(prompts), tmp_path / "shared", Share(rank, 4)) for rank in (2, 0, 3, 1)
    ]
    assert cards[:3] == [None] * 3, "the last to finish puts the parts together"
    assert cards[3]["scores"] == whole["scores"]
    rows = [json.loads(line) for line in (tmp_path / "shared" / "records.jsonl").read_text().splitlines()]
    assert len(rows) == len({(r["prompt"], r["index"]) for r in rows}) == 16
    assert {r["index"] for r in rows if r["prompt"] == "a photo of 0 cats"} == {0, 1, 2, 3}


def test_another_evaluation_in_the_folder_is_refused_by_what_differs(prompts, tmp_path):
    run(NoiseSampler(), settings(prompts), tmp_path / "e")
    with pytest.raises(PosttrainError, match=r"sampler\.steps \(was 40, now 10\)"):
        run(NoiseSampler(), settings(prompts, steps=10), tmp_path / "e")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "summary.json").write_text("{}")
    with pytest.raises(PosttrainError, match=r"an evaluation of an earlier version.*remove it"):
        run(NoiseSampler(), settings(prompts), tmp_path / "older")
    with pytest.raises(PosttrainError, match=r"model\.sha256"):
        run(NoiseSampler(light=0.5), settings(prompts), tmp_path / "e")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(PosttrainError, match="something else than an evaluation"):
        run(NoiseSampler(), settings(prompts), tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        run(NoiseSampler(lives=1), settings(prompts), tmp_path / "half")
    with pytest.raises(PosttrainError, match=r"sampler\.seed"):
        run(NoiseSampler(), settings(prompts, seed=1), tmp_path / "half")


def apart(sampler, evaluation, folder):
    console = Console(file=io.StringIO(), width=200)
    used, card = evaluate_apart(sampler, evaluation, folder, weights="raw", console=console)
    return used.name, card["sampler"]["seed"], console.file.getvalue()


def test_another_evaluation_of_a_model_gets_a_folder_of_its_own(prompts, tmp_path):
    folder = tmp_path / "e"
    assert apart(NoiseSampler(), settings(prompts), folder)[:2] == ("e", 0)
    with pytest.raises(KeyboardInterrupt):
        apart(NoiseSampler(lives=1), settings(prompts, seed=1), folder)
    assert apart(NoiseSampler(), settings(prompts, seed=2), folder)[:2] == ("e-3", 2), (
        "e-2 holds a batch of seed 1"
    )
    shown, going_on = NoiseSampler(), NoiseSampler()
    assert apart(shown, settings(prompts), folder)[:2] == ("e", 0)
    assert apart(going_on, settings(prompts, seed=1), folder)[:2] == ("e-2", 1)
    assert (shown.calls, going_on.calls) == (0, 5)
    (tmp_path / "e-4").mkdir()
    (tmp_path / "e-4" / "eval.json").write_text("{")
    assert apart(NoiseSampler(), settings(prompts, seed=4), folder)[:2] == ("e-5", 4)


def test_an_evaluation_that_crashed_before_its_first_batch_does_not_block_the_next(prompts, tmp_path):
    folder = tmp_path / "e"
    with pytest.raises(KeyboardInterrupt):
        run(NoiseSampler(lives=0), settings(prompts), folder)
    name, seed, told = apart(NoiseSampler(), settings(prompts, seed=1), folder)
    assert (name, seed) == ("e", 1)
    assert "replaces an evaluation that ended before its first batch; sampler.seed (was 0, now 1)" in told


def test_an_evaluation_that_is_being_measured_is_not_replaced(prompts, tmp_path):
    class Busy(NoiseSampler):
        def images(self, *arguments):
            with pytest.raises(PosttrainError, match=r"holds another evaluation.*sampler\.seed"):
                run(NoiseSampler(), settings(prompts, seed=1), tmp_path / "e")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Busy(), settings(prompts), tmp_path / "e")
    run(NoiseSampler(), settings(prompts, seed=1), tmp_path / "e")


def test_the_card_says_what_was_measured(prompts, tmp_path):
    card = run(NoiseSampler(), settings(prompts), tmp_path / "e")
    assert card["prompts"]["rows"] == 8
    assert card["prompts"]["distinct"] == 7
    assert card["model"] == {
        "source": "noise",
        "weights": "raw",
        "settings": {"type": "noise"},
        "sha256": "light 0.0",
        "base": {},
    }
    assert card["forward_equivalents"] == 16
    values = [json.loads(line) for line in (tmp_path / "e" / "records.jsonl").read_text().splitlines()]
    few = [r["scores"]["jpeg_incompressibility"] for r in values if r["tag"] == "few"]
    many = [r["scores"]["jpeg_incompressibility"] for r in values if r["tag"] == "many"]
    assert card["tags"]["few"]["jpeg_incompressibility"]["mean"] == pytest.approx(sum(few) / len(few))
    means = (sum(few) / len(few) + sum(many) / len(many)) / 2
    assert card["tag_means"]["jpeg_incompressibility"] == pytest.approx(means)
    assert differing(card, {**card, "versions": {}, "seconds": 0}) == []


@pytest.mark.parametrize("moment", ["claim", "merge", "clean"])
def test_a_kill_at_any_moment_loses_and_leaves_nothing(prompts, tmp_path, monkeypatch, moment):
    whole = run(NoiseSampler(), settings(prompts, keep="png"), tmp_path / "whole")
    step = {"claim": "parts.write", "merge": "evaluate.result", "clean": "parts._remove_parts"}[moment]
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(f"posttrain.evaluation.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            run(NoiseSampler(), settings(prompts, keep="png"), tmp_path / "cut")
    (tmp_path / "cut" / ".claim.json.part").touch()
    again = NoiseSampler()
    card = run(again, settings(prompts, keep="png"), tmp_path / "cut")
    assert again.calls == (6 if moment == "claim" else 0)
    assert card["scores"] == whole["scores"]
    names = {p.name for p in (tmp_path / "cut").iterdir() if p.name[0] != "."}
    assert names == {"eval.json", "records.jsonl", "grid", "images"}
    assert len(list((tmp_path / "cut" / "images").iterdir())) == 16


def test_processes_that_start_at_once_share_and_do_not_collide(prompts, tmp_path):
    def five():
        for i in range(5):
            run(NoiseSampler(), settings(prompts), tmp_path / "e" / str(i))

    children = [start(five) for _ in range(3)]
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    whole = run(NoiseSampler(), settings(prompts), tmp_path / "whole")
    for i in range(5):
        card = json.loads((tmp_path / "e" / str(i) / "eval.json").read_text())
        assert card["scores"] == whole["scores"]
        assert not (tmp_path / "e" / str(i) / "parts").exists()


def test_the_rank_in_the_environment_must_be_below_the_world_size(monkeypatch):
    assert rank_and_world_size() == (0, 1)
    for rank, world in (("8", "8"), ("-1", "2"), ("a", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(
            PosttrainError,
            match=f"RANK={rank} and WORLD_SIZE={world} in the environment: RANK must be from 0",
        ):
            rank_and_world_size()


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_kept_images_carry_their_record(prompts, tmp_path, kind):
    run(NoiseSampler(), settings(prompts, keep=kind), tmp_path / "e")
    rows = [json.loads(line) for line in (tmp_path / "e" / "records.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == 16
    row = rows[5]
    with Image.open(tmp_path / "e" / row["image"]) as image:
        text = image.text["posttrain"] if kind == "png" else image.getexif()[ExifTags.Base.ImageDescription]
    inside = json.loads(text)
    assert (inside["prompt"], inside["index"]) == (row["prompt"], row["index"])
    assert inside["scores"] == row["scores"]
    assert row["image"] == f"images/00005-a-photo-of-2-cats-1.{'png' if kind == 'png' else 'jpg'}"


def test_a_reward_that_fails_stops_it_and_what_was_done_stays(prompts, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    assert not any('6' in p for p in prompts), 'six, as a typewriter would write it'\n    return [0.0] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match="six"):
        run(NoiseSampler(), settings(prompts, rewards=["picky:score"]), tmp_path / "e")
    assert len([p for p in (tmp_path / "e" / "parts").iterdir() if p.is_dir()]) == 4


def test_the_fingerprint_is_of_values_not_of_storage():
    weights = {"b": torch.randn(3, 2).bfloat16(), "a": torch.arange(4.0)}
    assert hash_of(weights) == hash_of({"a": weights["a"].double(), "b": weights["b"].float()})
    assert hash_of(weights) != hash_of({**weights, "a": weights["a"] + 1e-6})
    assert hash_of(weights) != hash_of({"b": weights["b"].T.contiguous(), "a": weights["a"]})


def test_suites_say_where_their_prompts_are_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"2212 rows\).*DiffusionNFT.*--prompts"):
        suite_prompts("geneval", None)
    with pytest.raises(RecipeError, match="did you mean 'drawbench'"):
        suite_prompts("drawbnch", None)
    (tmp_path / "data" / "ocr").mkdir(parents=True)
    (tmp_path / "data" / "ocr" / "test.txt").write_text('a sign "A"\n')
    assert suite_prompts("ocr", None) == ("data/ocr/test.txt", ("ocr",))
    assert published_as(SUITES["ocr"].sha256) == "ocr"
    assert published_as("0") is None


def test_compare_pairs_samples_and_says_what_is_not_significant(prompts, tmp_path):
    run(NoiseSampler(), settings(prompts), tmp_path / "a" / "evaluation")
    run(NoiseSampler(), settings(prompts), tmp_path / "same")
    run(NoiseSampler(light=0.7), settings(prompts, keep="png"), tmp_path / "light")
    found = load([tmp_path / "a", tmp_path / "same", tmp_path / "light"])
    assert [one.name for one in found.evaluations] == ["a", "same", "light"]
    assert found.remarks == []
    assert len(found.keys) == 16
    change, low, high = found.difference(found.evaluations[2], "jpeg_incompressibility")
    assert low <= change <= high < 0, "less contrast, fewer bytes"
    assert worded(found.difference(found.evaluations[1], "jpeg_incompressibility")).endswith(
        "not significant"
    )
    text = io.StringIO()
    Console(file=text, width=100).print(compare_table(found))
    assert text.getvalue().count("not significant") == 1
    assert "lower" not in text.getvalue()
    found.evaluations[0].card["scores"]["jpeg_incompressibility"]["higher_is_better"] = False
    assert found.heading("jpeg_incompressibility") == "jpeg_incompressibility (lower is better)"
    write_page(found, tmp_path / "page" / "c.html", 3)
    page = (tmp_path / "page" / "c.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 2 * 2, "all of one, the grid's two of the others"
    assert "http" not in page.replace("http-equiv", "")


def test_one_prompt_is_compared_over_its_images(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    for name, light in (("a", 0.0), ("b", 0.02)):
        run(NoiseSampler(light=light), settings(tmp_path / "p.txt", images_per_prompt=8), tmp_path / name)
    found = load([tmp_path / "a", tmp_path / "b"])
    change, low, high = found.difference(found.evaluations[1], "jpeg_incompressibility")
    assert low < change < high


def test_compare_refuses_or_remarks_what_is_not_comparable(prompts, tmp_path):
    run(NoiseSampler(), settings(prompts), tmp_path / "a")
    run(NoiseSampler(), settings(prompts, guidance=1.0, images_per_prompt=1), tmp_path / "b")
    found = load([tmp_path / "a", tmp_path / "b"])
    assert len(found.keys) == 8
    assert "compared on the 8 samples that all have (16 in a, 8 in b)" in found.remarks[0]
    assert "sampler.guidance (a: 4.5, b: 1.0)" in found.remarks[1]
    other = tmp_path / "p.txt"
    other.write_text("a dog\n")
    run(NoiseSampler(), settings(other), tmp_path / "c")
    with pytest.raises(PosttrainError, match="share no sample"):
        load([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(PosttrainError, match="no finished evaluation"):
        load([tmp_path / "a", tmp_path])
    with pytest.raises(PosttrainError, match="one folder was given twice"):
        load([tmp_path / "a", tmp_path / "a"])


def small_evaluation(folder):
    """The arguments of an evaluation of three images, whose prompts are written into ``folder``."""
    (folder / "p.txt").write_text("a circle\na square\na triangle\n")
    arguments = ["eval", "posttrain/tiny-sd3", "--prompts", "p.txt", "--reward", "jpeg_compressibility"]
    for pair in ("resolution=64", "steps=1", "batch_size=1", "guidance=1"):
        arguments += ["--set", pair]
    return arguments


def test_processes_of_the_command_line_share_an_evaluation(tmp_path):
    small = small_evaluation(tmp_path)
    posttrain(*small, "--output", "one", cwd=tmp_path)
    done = posttrain(*small, "--output", "two", "--processes", "2", cwd=tmp_path)
    assert done.stdout.count("result card and images: two") == 1
    one, two = ((tmp_path / name / "records.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    compared = posttrain("compare", "one", "two", "--output", "c.html", cwd=tmp_path).stdout
    assert "+0.000 [+0.000, +0.000] not significant" in compared


@pytest.mark.matrix  # what is refused, and what is said of a process that failed, are tested in one process
def test_processes_of_the_command_line_that_fail_say_why(tmp_path):
    small = small_evaluation(tmp_path)
    posttrain(*small, "--output", "two", cwd=tmp_path)
    failed = posttrain(*small, "--set", "steps=2", "--output", "two", "--processes=2", cwd=tmp_path, code=1)
    assert "of 2 failed" in failed.stderr
    assert "sampler.steps (was 1, now 2)" in failed.stderr


@pytest.mark.parametrize(
    ("model", "suite", "name"),
    [
        ("runs/r/sft/final", None, "eval-r-sft"),
        ("./runs/r/sft", "geneval", "eval-r-sft-geneval"),
        ("runs/r/sft/checkpoints/step-00000040", None, "eval-r-sft-step-00000040"),
        ("owner/model", None, "eval-owner-model"),
    ],
)
def test_the_folder_of_an_evaluation_tells_of_which_weights_it_is(model, suite, name):
    assert _default_name(model, suite) == name
