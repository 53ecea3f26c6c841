"""Laws of every trainer: no flag is dropped in silence, no value ends in a traceback, pages name the flags."""

import contextlib
import math
import re

import pytest
from forked import ROOT, posttrain
from hypothesis import given, settings
from hypothesis import strategies as st
from imported import SHORT

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import parsed
from posttrain.importing.draft import Draft, text_of
from posttrain.importing.flags import Settings
from posttrain.importing.trainer import Start
from posttrain.importing.trainers import TRAINERS, translate
from posttrain.recipe.file import load_recipe, parse_recipe
from posttrain.recipe.positions import parse

FACTORY = ["--train.group_size=4", "--rewards", '{"reward_model": "PickScore"}', "--model.model_type=sd3",
           "--model.model_name_or_path=a/stable-diffusion-3.5"]  # fmt: skip
SIMPLE = ["--model_family=sd3", "--max_train_steps=10"]
STARTS = [
    ("hy-soar", SHORT),
    ("flow-grpo", ["--config=config/grpo.py:general_ocr_sd3_1gpu"]),
    ("diffusion-nft", ["--config=config/nft.py:sd3_geneval"]),
    *(
        ("flow-factory", [*FACTORY, f"--train.trainer_type={kind}", f"--scheduler.dynamics_type={dynamics}",
                          f"--model.finetune_type={tune}"])
        for kind, dynamics, tune in (("grpo", "CPS", "lora"), ("nft", "ODE", "full"), ("awm", "ODE", "lora"),
                                     ("dpo", "ODE", "lora"), ("sft", "ODE", "full"))
    ),
    ("simpletuner", [*SIMPLE, "--model_type=lora"]),
    ("simpletuner", [*SIMPLE, "--model_type=full"]),
]  # fmt: skip
"""A trainer, and flags that are enough for it: of each algorithm, and of LoRA and full tuning."""
FIRST = dict(reversed(STARTS))
FITTING = {
    "sample.num_image_per_prompt": 8, "sample.train_batch_size": 24, "sample.num_batches_per_epoch": 16,
    "train.group_size": 2, "train.unique_sample_num_per_epoch": 16, "train.gradient_accumulation_steps": 2,
    "num_epochs": 10,
}  # fmt: skip


OTHERWISE = {("diffusion-nft", "sample.train_batch_size"): 18}
"""Values for flags whose default does not fit the others of STARTS."""


def translated(trainer, start, name, value, processes=1, **how):
    """``start`` with one flag more."""
    prefix = "config." if TRAINERS[trainer].published else ""
    return translate(trainer, [*start, f"--{prefix}{name}={value}"], processes, **how)


def rate_of(trainer):
    return next(name for name in TRAINERS[trainer].table if "learning_rate" in name)


@pytest.mark.parametrize(("trainer", "start"), STARTS)
def test_no_flag_is_dropped_in_silence(trainer, start):
    """Each flag of the tables, given with its default, has a field, a reason or a nearest thing."""
    taken = {word.lstrip("-").partition("=")[0] for word in start if word.startswith("--")}
    for name, flag in TRAINERS[trainer].table.items():
        if name in taken or flag.default in (None, "") or not flag.translated:
            continue
        value = OTHERWISE.get((trainer, name), FITTING.get(name, flag.default))
        found = translated(trainer, start, name, value, 2)
        accounts = [*found.translated, *found.idle, *found.lost]
        spelled = f"{TRAINERS[trainer].prefix}{name}"
        mine = [words for shown, words in accounts if shown.split()[0] == spelled]
        assert mine, spelled
        assert not [words for words in mine if words.startswith("no field")], spelled


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_unknown_flag_is_named_with_a_hint(trainer):
    name = rate_of(trainer)
    wrong = name.replace("learning", "learnng")
    with pytest.raises(PosttrainError, match=f"(?s)learnng.*did you mean '{name}'"):
        translated(trainer, FIRST[trainer], wrong, 1)
    assert "learnng" in translated(trainer, FIRST[trainer], wrong, 1, lenient=True).unknown[0]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("value", ["abc", "nan", "inf", "[1, 2]"])
def test_a_wrong_value_is_refused(trainer, value):
    with pytest.raises(PosttrainError, match=r"learning_rate is a number, not"):
        translated(trainer, FIRST[trainer], rate_of(trainer), value)


plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
)  # fmt: skip


@given(
    st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.-_ :#", min_size=1), inner, max_size=3)
        ),
    )
)
def test_a_value_is_written_as_yaml_that_reads_alike(value):
    read = parse(f"value: {text_of(value)}", "text").data["value"]
    assert same(read, value)


ODD = st.one_of(
    st.sampled_from([0, -1, 1, 2, 0.5, 1e308, True, False, "", "x", "none", "1", ": #", None]),
    st.lists(st.sampled_from([0, -5, 5, "a", None, {}, 0.1]), max_size=2),
    st.dictionaries(st.sampled_from(["a", "reward_model", "dataset_dir", "train", "learning_rate", "betas"]),
                    st.sampled_from([1, "x", None, []]), max_size=2),
).flatmap(lambda value: st.sampled_from([value, [value]]))  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
@settings(max_examples=40)
@given(data=st.data())
def test_no_value_of_a_flag_ends_in_a_traceback(trainer, data):
    known = TRAINERS[trainer]
    values = Settings(known.title, known.prefix, known.table)
    start = data.draw(st.sampled_from([words for name, words in STARTS if name == trainer]))
    pairs = [*parsed(start, known.scripts).flags]
    if known.published:
        pairs = [*known.published[pairs[0][1].partition(":")[2]][1].items()]
    pairs += data.draw(st.lists(st.tuples(st.sampled_from(sorted(known.table)), ODD), min_size=1, max_size=3))
    draft = Draft(values)
    with contextlib.suppress(PosttrainError):
        for name, value in pairs:
            values.give(name, value)
        known.build(values, draft, Start(processes=data.draw(st.sampled_from([1, 3, 8]))))
        parse_recipe(draft.yaml("odd"), "recipe", checks=False)


def same(read, value):
    if isinstance(value, float) and not isinstance(value, bool):
        return isinstance(read, float | int) and math.isclose(read, value, rel_tol=1e-15)
    if isinstance(value, list):
        return len(read) == len(value) and all(map(same, read, value))
    if isinstance(value, dict):
        return list(read) == list(value) and all(same(read[k], value[k]) for k in value)
    return type(read) is type(value) and read == value


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_page_of_a_trainer_names_flags_that_it_has(trainer):
    page = re.sub(r"^```.*?^```", "", (ROOT / "docs" / f"from-{trainer}.md").read_text(), flags=re.M | re.S)
    heading = {"hy-soar": "Flags", "simpletuner": "Options"}.get(trainer, "Settings")
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", page, re.M | re.S)
    table = TRAINERS[trainer].table
    rows = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    named = {flag.lstrip("-") for row in rows for flag in re.findall(r"`([^`]+)`", row)}
    assert named
    assert named <= set(table), named - set(table)
    told_of = {word.lstrip("-").removeprefix("config.") for word in re.findall(r"`([^`]+)`", page)}
    assert {name for name, flag in table.items() if flag.translated} - told_of == set()


def test_the_command(tmp_path):
    words = ("import-flags", "diffusion-nft", "config/nft.py:sd3_multi_reward", "--output", "nft.yaml")
    done = posttrain(*words, "--", "--config.beta=0.5", cwd=tmp_path)
    assert done.stdout == ""
    for told_of in (
        "DiffusionNFT: ",
        "not needed:",
        "behaves differently:",
        "missing here",
        "wrote nft.yaml; next: posttrain check",
    ):
        assert told_of in done.stderr
    assert load_recipe(tmp_path / "nft.yaml", checks=False).stages[0].algorithm.beta == 0.5
    refused = posttrain("check", "nft.yaml", cwd=tmp_path, code=1).stderr
    assert "no file 'dataset/pickscore/train.txt'" in refused
    assert "exists" in posttrain(*words, cwd=tmp_path, code=1).stderr
    (tmp_path / "dataset" / "pickscore").mkdir(parents=True)
    for name in ("train", "test"):
        (tmp_path / "dataset" / "pickscore" / f"{name}.txt").write_text("a cat\na dog\n")
    assert (
        "no file"
        not in posttrain(
            "import-flags", "diffusion-nft", "config/nft.py:sd3_multi_reward", cwd=tmp_path
        ).stderr
    )
