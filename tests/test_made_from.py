"""A run knows what it was made from: replaced weights are refused, replaced data and prompts are told."""

import io
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from image_layouts import with_captions, with_tars
from pipelines import load, pipeline_folder
from rich.console import Console
from runs import EVALUATION, HEAD, cut_off_after, recipe, run_quietly, stage

from posttrain.data.family import Opening
from posttrain.data.image_data import ImageData
from posttrain.data.prompt_data import PromptData
from posttrain.data.settings import PromptFile
from posttrain.distributed.world import ALONE
from posttrain.errors import ModelError, PosttrainError
from posttrain.evaluation import compare
from posttrain.evaluation.card import differing
from posttrain.evaluation.likeness import unlike
from posttrain.evaluation.report.results import load_results
from posttrain.flow.sampling_settings import Sampling
from posttrain.recipe.file import overridden
from posttrain.rewards.callable import Callable
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.shapes.dataset import build
from posttrain.stages import made_from
from posttrain.stages.artifact import open_artifact, open_sampler
from posttrain.stages.lineage import describe
from posttrain.stages.made_from import confirm_data, confirm_weights
from posttrain.stages.result import RunResult
from posttrain.stages.run import Run
from posttrain.stages.stage_run import StageRun
from posttrain.support import user_code
from posttrain.weights import fingerprints
from posttrain.weights.files import sha256
from posttrain.weights.fingerprints import by_component, changed, prints_of
from posttrain.weights.writing import entries_of

CPU = torch.device("cpu")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LORA = "{type: lora, rank: 2}"


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(pipeline_folder(), tmp_path / "base")


def head(base):
    return HEAD.replace(str(pipeline_folder()), str(base))


def perturb(file):
    """Changes one bit of the last number, a second later: the clocks of file systems are coarse."""
    content, later = bytearray(file.read_bytes()), file.stat().st_mtime_ns + 10**9
    content[-4] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(later, later))


def opened(base, folder, *stages):
    made = recipe(*(stages or [stage("sft")]), head=head(base))
    return Run(made, made.model, folder, CPU, Console(file=io.StringIO()), ALONE)


def begun(folder):
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)


def test_a_print_is_of_the_content_and_is_computed_once(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"one")
    first = prints_of({"x/a": tmp_path / "a"})
    os.utime(tmp_path / "a", ns=(1, 1))
    hashed = []
    monkeypatch.setattr(fingerprints, "sha256_once", lambda file, **_: hashed.append(file) or "other")
    assert prints_of({"x/a": tmp_path / "a"}, first)["x/a"]["sha256"] == "other", "the time differs"
    monkeypatch.undo()
    touched = prints_of({"x/a": tmp_path / "a"}, first)
    assert touched != first
    assert changed(first, touched) == []
    assert by_component(first) == by_component(touched)
    monkeypatch.setattr(fingerprints, "sha256_once", None)
    assert prints_of({"x/a": tmp_path / "a"}, touched) == touched
    assert changed(first, {}) == changed({}, first) == ["x/a"]
    assert changed({"x/a": "damaged"}, first) == ["x/a"]


@pytest.mark.parametrize("file", [TRANSFORMER, "vae/config.json", "text_encoder_3/model.safetensors", "tokenizer/tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("where", ["sft", "base"])
def test_a_base_that_was_replaced_is_refused_once_something_was_made(base, tmp_path, file, where):
    run = opened(base, tmp_path / "run")
    (sft,) = run.recipe.stages
    first = confirm_weights(run, None if where == "base" else sft)
    assert by_component(first).keys() == {"scheduler", "transformer", "vae", *(f"{k}{n}" for k in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))}  # fmt: skip
    assert not changed(first, confirm_weights(run, sft))
    perturb(base / file)
    assert changed(first, confirm_weights(run, sft)) == [file], "nothing was made yet"
    perturb(base / file)
    confirm_weights(run, None if where == "base" else sft)
    begun(tmp_path / "run" / where)
    os.utime(base / file)
    assert not changed(first, confirm_weights(run, sft)), "the content is the same"
    perturb(base / file)
    with pytest.raises(
        PosttrainError, match=rf"sft: the base model was replaced since '{where}' .*: {file}\. Put"
    ):
        confirm_weights(run, sft)
    (base / file).unlink()
    shutil.copy(pipeline_folder() / file, base / file)
    assert not changed(first, confirm_weights(run, sft))


def test_weights_that_a_stage_starts_from_and_rewards_may_not_be_replaced(base, tmp_path):
    parent = tmp_path / "run" / "one" / "final"
    model = load(base)
    model.save(parent, "fp32", {})
    run = opened(base, tmp_path / "run", stage("one"), stage("two"))
    _, two = run.recipe.stages
    network = tmp_path / "network.pt"
    network.write_bytes(b"weights")
    reward = SimpleNamespace(label="mine", weight_files=lambda: {"path/network.pt": network})
    two = SimpleNamespace(name="two", rewards=[reward])
    confirm_weights(run, two, [parent])
    record = made_from.read(tmp_path / "run" / "two")
    assert [*record["parents"]] == ["one/final"]
    assert [*record["parents"]["one/final"]] == [TRANSFORMER]
    begun(tmp_path / "run" / "two")
    perturb(parent / "vae/config.json")  # of which nothing is loaded
    confirm_weights(run, two, [parent])
    network.write_bytes(b"other weights")
    with pytest.raises(
        PosttrainError, match=r"the weights of a reward were replaced .*mine/path/network\.pt"
    ):
        confirm_weights(run, two, [parent])
    confirm_weights(run, two, [parent], evaluating=True)
    perturb(parent / TRANSFORMER)
    with pytest.raises(PosttrainError, match=rf"two: the weights that it starts from were replaced .*one/final/{TRANSFORMER}"):  # fmt: skip
        confirm_weights(run, two, [parent], evaluating=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"base": 3, "changes": {}}'])
def test_a_damaged_record_is_written_anew(base, tmp_path, content):
    run = opened(base, tmp_path / "run")
    begun(tmp_path / "run" / "sft")
    file = tmp_path / "run" / "sft" / "made_from.json"
    file.write_bytes(content)
    for lines in (1, 0):
        run.console.file = io.StringIO()
        confirm_weights(run, run.recipe.stages[0])
        printed = run.console.file.getvalue()
        assert printed.count(f"{str(file)!r} is damaged: ") == lines
        assert printed.count("; it is now 'made_from.damaged.json', and what was replaced") == lines
    assert TRANSFORMER in made_from.read(tmp_path / "run" / "sft")["base"]
    assert file.with_name("made_from.damaged.json").read_bytes() == content


def image_data(folder):
    build(folder, 8, 1, "clean")
    return ImageData(images=folder / "train.jsonl", image_dir=folder / "images")


DATA = {
    "nothing": (lambda folder: None, None),
    "rows": (lambda folder: (folder / "train.jsonl").open("a").write("\n"), "the file of rows changed"),
    "sizes": (lambda folder: next((folder / "images").iterdir()).open("ab").write(b"x"), r"images \(8, \d+ bytes; now 8, \d+\) changed"),
    "times": (lambda folder: os.utime(next((folder / "images").iterdir()), ns=(1, 1)), "times of images, though no size, changed"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), DATA.values(), ids=DATA)
def test_data_that_was_replaced_is_told_and_kept_in_the_record(tmp_path, change, words):
    data, printed = image_data(tmp_path / "data"), io.StringIO()
    made = SimpleNamespace(name="sft", data=data, rewards=[])
    run = StageRun(None, made, load(), tmp_path / "run", Console(file=printed, width=300))
    confirm_data(run, data.open(Opening(run.model, tmp_path, 4)), 0)
    change(tmp_path / "data")
    again = data.open(Opening(run.model, tmp_path, 4))
    confirm_data(run, again, 6)
    confirm_data(run, again, 7)
    told, record = printed.getvalue(), made_from.read(run.folder)
    if words is None:
        assert told == ""
        assert "changes" not in record
        return
    (line,) = record["changes"]
    assert line in told
    assert told.count("\n") == 1
    assert line.startswith("after step 6: ")
    assert re.search(words, line)


LAYOUT_CHANGES = {
    "nothing": (lambda folder: None, None),
    "caption": (lambda folder: (folder / "a" / "00.txt").write_text("another"), "captions or other columns changed"),
    "image": (lambda folder: (folder / "a" / "00.png").open("ab").write(b"x"), r"images \(12, \d+ bytes; now 12, \d+\) changed"),
    "tar": (lambda folder: os.utime(folder / "0.tar", ns=(1, 1)), "times of images, though no size, changed"),
    "tar of others": (lambda folder: shutil.copy(folder / "1.tar", folder / "0.tar"), "captions or other columns and images .* changed"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), LAYOUT_CHANGES.values(), ids=LAYOUT_CHANGES)
def test_data_of_other_layouts_that_was_replaced_is_told(tmp_path, change, words):
    make = with_tars if words and "tar" in str(change.__code__.co_consts) else with_captions
    data = ImageData(images=make(tmp_path / "data"), resolution=32, tolerance=1.0)
    printed = io.StringIO()
    run = StageRun(None, SimpleNamespace(name="sft", data=data, rewards=[]), load(), tmp_path / "run", Console(file=printed, width=300))  # fmt: skip
    confirm_data(run, data.open(Opening(run.model, tmp_path, 4)), 0)
    change(tmp_path / "data")
    confirm_data(run, data.open(Opening(run.model, tmp_path, 4)), 6)
    if words is None:
        assert printed.getvalue() == ""
    else:
        assert re.search(f"after step 6: {words} since", printed.getvalue())


def test_prompts_that_were_replaced_are_told_unless_no_step_was_taken(tmp_path):
    file, printed = tmp_path / "prompts.txt", io.StringIO()
    file.write_text("a red circle\na blue square\n")
    data = PromptData(prompts=PromptFile(path=file), resolution=16)
    run = StageRun(
        None,
        SimpleNamespace(name="nft", data=data, rewards=[]),
        load(),
        tmp_path / "run",
        Console(file=printed, width=300),
    )
    confirm_data(run, data.open(Opening(run.model, tmp_path, 2)), 0)
    for start, told in ((0, 0), (2, 1)):
        file.write_text(file.read_text() + "a green triangle\n")
        confirm_data(run, data.open(Opening(run.model, tmp_path, 2)), start)
        assert printed.getvalue().count("the file of prompts changed") == told


CODE = "def score(images, prompts, metadata):\n    return [1.0] * len(prompts)\n"


def test_source_of_a_reward_that_was_replaced_is_told(tmp_path, monkeypatch):
    """The module that the recipe names takes the function from another one."""
    (tmp_path / "named_here.py").write_text("from made_there import score\n")
    (tmp_path / "made_there.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    data, printed = image_data(tmp_path / "data"), io.StringIO()
    made = SimpleNamespace(name="nft", data=data, rewards=[Callable(function="named_here:score")])
    run = StageRun(None, made, load(), tmp_path / "run", Console(file=printed, width=300))
    source = data.open(Opening(run.model, tmp_path, 4))
    confirm_data(run, source, 0)
    assert [*made_from.read(run.folder)["source"]["score"]] == ["named_here", "made_there"]
    for file, told in (("made_there.py", 1), ("named_here.py", 2), ("made_there.py", 3)):
        confirm_data(run, source, 5)
        (tmp_path / file).write_text((tmp_path / file).read_text() + "# other\n")
        confirm_data(run, source, 6)
        words = (
            "nft: after step 6: the source of the reward 'score' changed since the stage began; it goes on"
        )
        assert printed.getvalue().count(words) == told
    assert len(made_from.read(run.folder)["changes"]) == 3
    (reward,) = made.rewards
    before = {"scorers": {"score": {"weights": reward.hashes()}}}
    (tmp_path / "made_there.py").write_text(CODE)
    after = {"scorers": {"score": {"weights": reward.hashes()}}}
    assert len(differing(before, after)) == 1, "result cards tell them apart"
    confirm_data(run, source, 0)
    assert printed.getvalue().count("\n") == 3, "no step was taken"


def test_cards_know_the_source_of_a_class_of_rewards_and_of_what_it_inherits_from(tmp_path, monkeypatch):
    head = "from typing import Literal\n\nimport torch\n\nfrom posttrain.reward import Reward, Scores\n"
    (tmp_path / "base_of_all.py").write_text(f"""{head}
class Base(Reward):
    range = (0.0, 1.0)

    def load(self, device):
        return lambda images, prompts, metadata: Scores(torch.ones(len(images)))
""")
    (tmp_path / "even.py").write_text(
        f"{head}from base_of_all import Base\n\nclass Even(Base):\n    type: Literal['even'] = 'even'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = user_code.load("even:Even")()
    assert reward.hashes() == {
        "source": {name: sha256(tmp_path / f"{name}.py") for name in ("even", "base_of_all")}
    }
    assert JpegIncompressibility().hashes() == {}, "a part of this package, whose version the card has"


def test_checkpoints_that_were_set_aside_do_not_keep_weights_from_being_replaced(tmp_path):
    for name in ("step-00000002.damaged", "step-00000004.foreign-2", ".step-00000006.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert not made_from.was_begun(tmp_path)
    (tmp_path / "checkpoints" / "step-00000002").mkdir()
    assert made_from.was_begun(tmp_path)


def test_a_run_that_was_cut_off_goes_on_only_from_the_base_it_began_with(base, tmp_path, monkeypatch):
    made = recipe(stage("lora", tune=LORA), head=head(base), evaluation=EVALUATION)
    cut_off_after(4, made, tmp_path / "run", monkeypatch)
    original = (base / TRANSFORMER).read_bytes()
    perturb(base / TRANSFORMER)
    with pytest.raises(
        PosttrainError, match=rf"the base model was replaced since '\w+' was begun .*{TRANSFORMER}"
    ):
        run_quietly(made, tmp_path / "run")
    (base / TRANSFORMER).write_bytes(original)
    run_quietly(made, tmp_path / "run")
    final = tmp_path / "run" / "lora" / "final"
    kept = json.loads((final / "posttrain.json").read_text())["base"]
    card = json.loads((tmp_path / "run" / "lora" / "evaluation" / "eval.json").read_text())
    assert card["model"]["base"] == kept == by_component(prints_of(made.model.weight_files()))
    assert [*unlike(load_results(tmp_path / "run").cards)] == []
    open_artifact(str(final), CPU)
    perturb(base / TRANSFORMER)
    with pytest.raises(ModelError, match=r"is a LoRA of another transformer than .* with --base"):
        open_artifact(str(final), CPU)
    open_artifact(str(final), CPU, str(base))
    spoil_and_compare(tmp_path / "run", card)


def content_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_refusal_leaves_a_finished_stage_that_would_go_on_as_it_was(base, tmp_path):
    made, folder = recipe(stage("sft"), head=head(base)), tmp_path / "run"
    run_quietly(made, folder)
    (folder / "sft" / "evaluation").mkdir()
    (folder / "sft" / "evaluation" / "eval.json").touch()
    before = content_of(folder)
    perturb(base / TRANSFORMER)
    longer = overridden(made, ["stages.sft.train.steps=8"])
    with pytest.raises(PosttrainError, match="the base model was replaced since 'sft' was begun"):
        run_quietly(longer, folder)
    after = content_of(folder)
    assert {p.name for p in after if after[p] != before.get(p)} == {"recipe.yaml"}, "that of the last start"
    assert after.keys() == before.keys()
    perturb(base / TRANSFORMER)
    printed = run_quietly(longer, folder)
    assert "sft: is evaluated again" in printed
    assert json.loads((folder / "sft" / "stage.json").read_text())["steps"] == 8


def spoil_and_compare(run, card):
    """Comparisons of evaluations on two bases, or on other prompts, say so."""
    file = run / "lora" / "evaluation" / "eval.json"
    other = {**card, "model": {**card["model"], "base": {**card["model"]["base"], "vae": "0" * 16}}}
    file.write_text(json.dumps(other))
    (line,) = compare.load([run / "base", run / "lora"]).remarks
    assert "were made from two base models: vae differ" in line
    assert [*unlike(load_results(run).cards)] == [
        "lora was evaluated on another base model (vae differ) than base: do not compare their scores."
    ]
    file.write_text(json.dumps({**card, "prompts": {**card["prompts"], "sha256": "0"}, "scorers": {}}))
    assert [*unlike(load_results(run).cards)] == [
        "lora was evaluated on other prompts and by other rewards than base: do not compare their scores."
    ]
    from posttrain.evaluation.report.page import write_report
    from posttrain.evaluation.report.table import table

    assert "do not compare their scores" in str(table(run).title)
    assert "do not compare their scores" in write_report(run).read_text()
    result, score = RunResult(run), next(iter(card["scores"]))
    assert result.gain("lora", score) is None
    assert not any("gain_mean" in row for row in result.table() if row["stage"] == "lora")
    del other["model"]["base"]
    file.write_text(json.dumps(other))
    assert [*unlike(load_results(run).cards)] == [], "a card of an earlier version does not say"
    assert RunResult(run).gain("lora", score) is not None


def test_a_whole_export_says_of_which_base_it_is(base, tmp_path):
    run = opened(base, tmp_path / "run")
    (sft,), final = run.recipe.stages, tmp_path / "run" / "sft" / "final"
    load(base).save(final, "fp32", entries_of({"proj_out.bias": torch.ones(16)}))
    hashes = by_component(confirm_weights(run, sft))
    described = describe(run.spec, [], sft, final, confirm_weights(run, sft))
    (final / "posttrain.json").write_text(json.dumps(described))
    settings = Sampling(resolution=16)
    for path in (final, base):
        assert open_sampler(str(path), CPU, settings)[0].base() == hashes
    (final / "posttrain.json").unlink()
    (sampler, _), others = open_sampler(str(final), CPU, settings), hashes.keys() - {"transformer"}
    assert {name for name, value in sampler.base().items() if value == hashes[name]} == others
