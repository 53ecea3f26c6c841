"""Curves go to a tracking service, which can neither stop a stage that trains nor hide that it failed."""

import json
import sys
from types import SimpleNamespace

import accelerate.tracking
import pytest
from PIL import Image
from runs import HEAD, TRAIN, recipe, run_quietly, stage

from posttrain.engine import service
from posttrain.engine.service import PACKAGES, Labels, Service, flat, service_problem
from posttrain.errors import RecipeError, TrainingError

SHORT = TRAIN.replace("steps: 6", "steps: 3")


class Fake(accelerate.tracking.GeneralTracker):
    """Keeps what it is given; stands in for a service's package."""

    requires_logging_directory = False
    main_process_only = True  # as mlflow's: accelerate would ask its own state for the process
    name = "fake"

    def __init__(self, **arguments):
        super().__init__()
        self.arguments, self.config, self.rows, self.pictures, self.finished = arguments, None, [], [], False
        made.append(self)

    @property
    def tracker(self):
        return SimpleNamespace(id=self.arguments.get("id"))

    def start(self):
        if self.arguments["run_name"] == "no-start":
            raise RuntimeError("no API key")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        if step == 2 and self.arguments["run_name"] == "breaks":
            raise ConnectionError("the network is gone")
        self.rows.append((step, values))

    def log_images(self, values, step=None):
        self.pictures.append((step, [image.size for image in values["samples"]]))

    def finish(self):
        self.finished = True


made = []


@pytest.fixture
def fake(monkeypatch):
    """``wandb``, as this install has it, is the fake."""
    made.clear()
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(service, "service_problem", lambda name: None)
    monkeypatch.setattr("posttrain.recipe.checks.service_problem", lambda name: None)


def named(name, steps=3):
    train = SHORT.replace("steps: 3", f"steps: {steps}")
    head = HEAD.replace("tracker: none", "tracker: wandb").replace("name: small", f"name: {name}")
    return recipe(stage("sft", train=train), head=head)


def test_a_stage_sends_its_curves_and_grids_under_the_names_of_the_recipe(fake, tmp_path):
    run_quietly(named("mine"), tmp_path / "run")
    (sent,) = made
    assert (sent.arguments["run_name"], sent.arguments["name"]) == ("mine", "run/sft")
    assert sent.arguments["dir"] == str(tmp_path / "run" / "sft")
    assert (sent.config["train.steps"], sent.config["algorithm.type"]) == (3, "sft")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(step, values["loss"]) for step, values in sent.rows] == [
        (row["step"], row["loss"]) for row in rows
    ]
    assert sent.finished
    run_quietly(named("mine", steps=4), tmp_path / "run")
    assert made[1].arguments["id"] == sent.arguments["id"], "the same curves go on"
    assert made[1].config is None, "they have their settings"
    assert [step for step, _ in made[1].rows] == [4]


def test_a_service_that_fails_is_left_out_and_the_stage_trains_on(fake, tmp_path):
    told = run_quietly(named("breaks"), tmp_path / "run")
    assert told.count("tracker: wandb failed and is left out from now on: the network is gone") == 1
    assert [step for step, _ in made[0].rows] == [1]
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3]
    assert (tmp_path / "run" / "sft" / "final").is_dir()


def test_grids_are_sent_to_a_service_that_takes_pictures(fake, tmp_path):
    sent = Service("wandb", tmp_path, Labels("project", "r/s"), print)
    sent.image("samples", 7, Image.new("RGB", (4, 2)))
    assert made[0].pictures == [(7, [(4, 2)])]
    blind = type("Blind", (), {"finish": lambda self: None})()
    sent.tracker = blind
    sent.image("samples", 8, Image.new("RGB", (4, 2)))  # is left out
    assert sent.tracker is blind


def test_a_service_that_does_not_start_is_one_clear_error(fake, tmp_path):
    with pytest.raises(TrainingError, match=r"tracker: wandb does not start: no API key; WANDB_MODE=offline"):
        Service("wandb", tmp_path, Labels("no-start", "r/s"), print)


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"tracker: wandb needs the package 'wandb'.*pip install wandb"):
        named("mine")
    assert service_problem("tensorboard") is None
    assert service_problem("none") is None


def test_every_service_is_one_of_accelerates_and_of_the_recipes():
    from typing import get_args

    from posttrain.recipe.schema import Recipe

    assert PACKAGES.keys() <= accelerate.tracking.LOGGER_TYPE_TO_CLASS.keys()
    assert {*get_args(Recipe.model_fields["tracker"].annotation)} == {*PACKAGES, "tensorboard", "none"}


def test_mlflow_goes_on_with_the_run_that_it_named(monkeypatch, tmp_path):
    class MLflow(Fake):
        @property
        def tracker(self):
            return SimpleNamespace(info=SimpleNamespace(run_id=self.arguments["run_id"] or "f00"))

        def __init__(self, **arguments):
            super().__init__(**arguments)

        def start(self):
            pass

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "mlflow", MLflow)
    for before in (None, "f00"):
        started = Service("mlflow", tmp_path, Labels("project", "r/s"), print).tracker
        assert started.arguments == {"experiment_name": "project", "run_name": "r/s", "run_id": before}


def test_settings_are_flat():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "x"}) == {
        "a.b": 1,
        "a.c": "[1, 2]",
        "d": None,
        "e": "x",
    }
    assert flat({"rewards": [{"url": "http://me:secret@host/v1"}]}) == {
        "rewards": "[{'url': 'http://host/v1'}]"
    }
