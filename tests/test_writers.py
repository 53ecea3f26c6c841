"""Every file is written by posttrain/support/files.py: beside its place, flushed, renamed."""

import ast
import os
import sys
from pathlib import Path

import pytest
from full_disk import most_bytes
from runs import EVALUATION, recipe, run_quietly, stage

from posttrain.engine.tracker import MetricsFile, Tracker, read_metrics
from posttrain.errors import PosttrainError
from posttrain.support import files

ROOT = Path(__file__).parent.parent
WRITES = {
    "write_text", "write_bytes", "touch", "hardlink_to", "symlink_to", "link", "symlink", "rename", "renames", "copyfile",
    "copy2", "copytree", "move", "save_file", "save_pretrained", "savetxt", "savez", "tofile", "fdopen",
    "NamedTemporaryFile", "SummaryWriter", "truncate", "mkstemp",
}  # fmt: skip
"""Names of functions and methods that write a file or give it its name."""
ALLOWED = {
    "posttrain/support/files.py": ("write_bytes rename replace copyfile open", "this is the one place"),
    "posttrain/support/device.py": ("write_text", "resets a counter of the system's, in /proc"),
    "posttrain/support/images.py": ("save", "into memory, or into the folder of an evaluation's part, which is published"),
    "posttrain/engine/tracker.py": ("open SummaryWriter", "curves are appended; a torn last line is left out when read"),
    "posttrain/engine/writing.py": ("open write_text rename", "into a folder that is published"),
    "posttrain/engine/part_file.py": ("open", "into a folder that is published"),
    "posttrain/stages/micro_batch.py": ("replace", "a damaged file gets a name that says so"),
    "posttrain/stages/made_from.py": ("replace", "a damaged record gets a name that says so"),
    "posttrain/stages/publish.py": ("write_text save", "into a folder that is published"),
    "posttrain/stages/hooks/checkpoints.py": ("save", "the method of posttrain/engine/checkpoint_folder.py"),
    "posttrain/stages/hooks/held_out.py": ("save", "the method of the hook for checkpoints"),
    "rewards/jpeg.py": ("save", "into memory"),
    "rewards/unifiedreward.py": ("save link", "into memory; a link is a connection"),
    "rewards/remote.py": ("link", "a link is a connection"),
    "posttrain/distributed/launch.py": ("open", "errors of processes, in a temporary folder"),
    "posttrain/support/heartbeat.py": ("touch write_text", "signs of life, in the launcher's temporary folder"),
    "posttrain/engine/checkpoint_folder.py": ("rename", "a damaged checkpoint gets a name that says so"),
    "posttrain/evaluation/evaluate.py": ("write_text save", "into a folder that is published"),
    "posttrain/evaluation/parts.py": ("rename hardlink_to", "names files that were published; the card comes last"),
    "posttrain/evaluation/report/pictures.py": ("save", "into memory"),
    "posttrain/scoring/judge.py": ("write_text save", "into a folder that is published"),
    "posttrain/shapes/pairs.py": ("open", "into a folder that is published"),
    "posttrain/shapes/dataset.py": ("open write_bytes write_text save", "into a folder that is published, or memory"),
    "posttrain/weights/companions.py": ("write_text", "into a folder that its caller publishes"),
    "posttrain/flow_model.py": ("save", "its own method, into a folder that its caller publishes"),
    "posttrain/stages/export.py": ("write_text save", "into a folder that is published"),
    "posttrain/weights/pipeline_folder.py": ("write_text", "into a folder that its caller publishes"),
    "posttrain/weights/transformer.py": ("write_text", "into a folder that its caller publishes"),
    "posttrain/weights/writing.py": ("open write_text", "files of a folder that its caller publishes"),
    "posttrain/weights/hub.py": ("open truncate", "a download that goes on where it stopped; published at its end"),
    "posttrain/models/_tiny_tokenizers.py": ("write_text", "into a temporary folder"),
    "posttrain/models/tiny_sd3.py": ("write_text save_pretrained", "into a folder that is published"),
    "posttrain/cache/store.py": ("save_file write_text", "aside, published after it"),
    "posttrain/recipe/file.py": ("dump", "into memory"),
}  # fmt: skip
"""Module -> calls that write otherwise, and why they may."""


def writes_of(file):
    """The names of the calls in ``file`` that write, or may."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        words = [
            a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)
        ]
        modes = [word for word in words if isinstance(word, str) and len(word) < 4 and {*word} & {*"wax+"}]
        paths_replace = name == "replace" and method and len(node.args) == 1 and not node.keywords
        written = name in ("save", "dump") and method and node.args
        if name in WRITES or (name == "open" and modes) or paths_replace or written:
            yield name


def test_no_module_writes_in_a_way_of_its_own():
    found = {}
    for folder in ("posttrain", "algorithms", "rewards"):
        for file in (ROOT / folder).rglob("*.py"):
            if names := set(writes_of(file)):
                found[file.relative_to(ROOT).as_posix()] = names
    assert found == {module: set(names.split()) for module, (names, _) in ALLOWED.items()}


def test_the_search_finds_what_it_looks_for(tmp_path):
    text = "p.open('w'); open(p, mode='ab'); p.write_text(''); os.replace(a); a.replace('b', 'c'); json.dump(a, f); open(p)"
    (tmp_path / "a.py").write_text(text)
    assert sorted(writes_of(tmp_path / "a.py")) == ["dump", "open", "open", "replace", "write_text"]


class Watched:
    """The files that this process opens for writing below a folder, as Python's audit events tell."""

    def __init__(self):
        self.folder, self.files = None, set()
        sys.addaudithook(self)  # it cannot be removed, so it does nothing without a folder

    def __call__(self, event, arguments):
        if self.folder is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
            path, flags = Path(arguments[0]).absolute(), arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR) and not path.is_dir()
            if writes and path.is_relative_to(self.folder):
                self.files.add(path.relative_to(self.folder))


WATCHED = Watched()


def test_a_run_opens_no_file_in_its_place_but_those_that_grow(tmp_path):
    train = "{steps: 1, batch_size: 2, micro_batch: 2, sample_every: 1}"
    made = recipe(stage("sft", train=train), evaluation=EVALUATION, overrides=["tracker=tensorboard"])
    try:
        WATCHED.folder, WATCHED.files = tmp_path / "run", set()
        run_quietly(made, tmp_path / "run")
    finally:
        WATCHED.folder = None
    in_place = {file for file in WATCHED.files if not any(part.endswith(".part") for part in file.parts)}
    growing = {f.name for f in in_place if not f.name.endswith(".lock") and "tensorboard" not in f.parts}
    assert growing == {"metrics.jsonl"}
    assert len(WATCHED.files) > len(in_place) + 10
    assert {path.name for path in (tmp_path / "run").rglob(".*")} == {".lock"}


WRITTEN = [
    # in the order in which a run writes them: part of the path that is flushed, and of the path that is named
    ("run.json", "run.json"), ("environment.json", "environment.json"), ("run/.recipe.yaml", "run/recipe.yaml"),
    ("base/.recipe.yaml", "base/recipe.yaml"), ("claim.json", "base/evaluation/claim.json"),
    ("records.jsonl", "base/evaluation/parts/000000"), ("000.png", "base/evaluation/parts/000000"),
    ("evaluation/.records.jsonl", "base/evaluation/records.jsonl"), ("eval.json", "base/evaluation/eval.json"),
    ("sft/.recipe.yaml", "sft/recipe.yaml"), ("train.jsonl", "data/shapes-clean-10-1"),
    ("metrics.jsonl", "sft/metrics.jsonl"), ("step-00000000.png", "sft/samples/step-00000000.png"),
    ("checkpoints/", "sft/checkpoints/step-00000001"), ("final", "sft/final"), ("stage.json", "sft/stage.json"),
    ("sft/evaluation/.claim.json", "sft/evaluation/claim.json"), ("report.html", "report.html"),
]  # fmt: skip


def test_a_full_disk_names_the_file_whatever_it_is_and_the_same_command_goes_on(tmp_path, monkeypatch):
    train = "{steps: 1, batch_size: 2, micro_batch: 2, sample_every: 1}"
    made = recipe(stage("sft", train=train), evaluation=EVALUATION)
    whole, folder = files._flush, tmp_path / "run"
    for flushed, named in WRITTEN:

        def flush(path, flushed=flushed):
            if flushed in path.as_posix() and path.is_file():
                raise OSError(28, "No space left on device")
            whole(path)

        monkeypatch.setattr(files, "_flush", flush)
        with pytest.raises(PosttrainError, match=rf"{named}': the disk is full \(.* GB free"):
            run_quietly(made, folder)
    monkeypatch.setattr(files, "_flush", whole)
    run_quietly(made, folder)
    assert (folder / "report.html").is_file()
    assert {path.name for path in folder.rglob(".*")} == {".lock"}


def test_metrics_and_curves_that_cannot_be_written_name_their_file(tmp_path):
    tracker = MetricsFile(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with (
        most_bytes(size + 5),
        pytest.raises(PosttrainError, match=r"metrics\.jsonl': .*at least \d+ B needed"),
    ):
        tracker.log(2, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with (
        most_bytes(size + 5),
        pytest.raises(PosttrainError, match=r"metrics\.jsonl': "),
        Tracker(tmp_path, resume_step=1, tensorboard=False) as ending,
    ):
        ending.log(2, {"loss": 1.0})
    curves = Tracker(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    for method in ("add_scalar", "add_histogram", "close"):
        setattr(curves._writer, method, full)
        with pytest.raises(PosttrainError, match="tensorboard': the disk is full"):
            curves.log(1, {"loss": 1.0}, {"a": [1.0]}) if method != "close" else curves.close()
        delattr(curves._writer, method)
    curves.close()


def test_a_pipe_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write(tmp_path / "pipe", "a text")
        assert os.read(reading, 99) == b"a text"
    finally:
        os.close(reading)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_through_a_link_the_file_that_it_names_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("one", "two"):
        files.write(tmp_path / "link", text)
        assert (tmp_path / "elsewhere" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()
