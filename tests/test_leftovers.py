"""What a killed run leaves unfinished is gone when it is taken up again; what is whole stays."""

import os
import time

from runs import recipe, run_quietly, stage

from posttrain.shapes.dataset import build
from posttrain.stages.leftovers import remove_leftovers
from posttrain.support.files import STALE_SECONDS, aside, clear_stale, published, write


def made(folder, *paths):
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.mkdir if path.endswith("/") else file.touch)()


LEFT = [
    ".recipe.yaml.ab12cd34.part",
    "data/.shapes-clean-10-1.ab12cd34.part/images/x.jpg",
    "s/.metrics.jsonl.ab12cd34.part",
    "s/.final.part/transformer/weights.safetensors",
    "s/checkpoints/.step-00000004.part/state.pt",
    "s/checkpoints/step-00000002/",
    "s/samples/.step-00000000.png.ab12cd34.part",
    "s/evaluation/parts/.000001.part/records.jsonl",
    "t/checkpoints/",
    "base/evaluation/parts/000001/records.jsonl",
    "base/evaluation/claim.json",
    "u/.final.before.part/old",
    "u/final/.grid.png.ab12cd34.part",
    "model/autoencoder-images/.x.part",
]
WHOLE = [
    "recipe.yaml",
    "s/metrics.jsonl",
    "s/checkpoints/step-00000006/state.pt",
    "s/evaluation/parts/000000/records.jsonl",
    "s/evaluation/claim.json",
    "u/final/new",
    "part",
    "s/samples/a.part",
]


def test_what_is_unfinished_goes_and_what_is_whole_stays(tmp_path):
    made(tmp_path, *LEFT, *WHOLE)
    (tmp_path / "base" / "evaluation" / "eval.json").write_text("{}")
    made(tmp_path, "v/.final.before.part/old")  # killed between the two renames
    remove_leftovers(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files - {"base/evaluation/.lock"} == {*WHOLE, "base/evaluation/eval.json", "v/final/old"}
    assert not (tmp_path / "t" / "checkpoints").exists()
    assert not (tmp_path / "s" / "checkpoints" / "step-00000002").exists()


def test_the_names_that_writers_use_are_those_that_are_removed(tmp_path):
    for writer in (lambda: aside(tmp_path / "s" / "x", "ab12cd34"), lambda: published(tmp_path / "s" / "y")):
        with writer() as part:
            part.mkdir(exist_ok=True)
            name = part.name
            part.rename(tmp_path / "s" / "aside")
            part.mkdir()
        (tmp_path / "s" / "aside").rename(tmp_path / "s" / name)  # as a kill leaves it
    write(tmp_path / "s" / "z", "whole")
    assert len(list((tmp_path / "s").iterdir())) == 4
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["y", "z"]


def test_a_finished_run_that_is_taken_up_again_is_tidied(tmp_path):
    small = recipe(stage("s", train="{steps: 1, batch_size: 4, sample_every: null}"))
    run_quietly(small, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    made(tmp_path, "s/checkpoints/.step-00000004.part/state.pt", "data/.x.ab12cd34.part/images/x.jpg")
    run_quietly(small, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_what_no_process_works_on_is_stale(tmp_path):
    made(tmp_path, ".old.part/images/x", ".busy.part/rows.jsonl", ".new.part", ".other/x")
    long_ago = time.time() - 2 * STALE_SECONDS
    for path in (".old.part", ".old.part/images", ".busy.part", ".other"):
        os.utime(tmp_path / path, (long_ago, long_ago))
    clear_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".busy.part", ".new.part", ".other"]


def test_a_half_built_data_set_is_removed_when_the_set_is_built_again(tmp_path):
    made(tmp_path, ".set.part/images/x", ".another.part/x")
    build(tmp_path / "set", 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".another.part", "set"]
