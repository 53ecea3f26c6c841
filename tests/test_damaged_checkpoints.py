"""Whatever happens to a checkpoint's files is noticed and named, and the newest whole one is used."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from runs import TRAIN, recipe, run_quietly, stage
from stored import whole_state
from test_checkpoints import ALL, TENSORS, folder_of, go_on, same, started, state

from posttrain.engine.checkpoint_folder import saved
from posttrain.engine.manifest import keys_of, kind_of
from posttrain.engine.part_file import read_pieces, write_pieces
from posttrain.errors import ModelError, PosttrainError
from posttrain.policy.piece import Piece
from posttrain.stages.artifact import open_artifact

FIRST = "0.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of steps 2, 4 and 6 of one run in ``one``, and of another run of the same shapes in ``other``."""
    made = tmp_path_factory.mktemp("trained")
    for name, seed in (("one", 0), ("other", 5)):
        policy, strategy = started(seed)
        for step in range(1, 7):
            go_on(policy, strategy, step)
            if step % 2 == 0:
                extra = {"updates": step, "next_batch": step, "rewards": [0.5]}
                with folder_of(made / name, policy, strategy, name) as folder:
                    folder.save(step, extra, ALL)
    return made


def flip(place):
    """Change one bit of a file, at ``place`` between 0 and 1."""

    def damage(file):
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        file.write_bytes(content)

    return damage


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file):
    file.write_bytes(b"")


def gone(file):
    file.unlink()


def folder_instead(file):
    file.unlink()
    file.mkdir()


def saying(**changed):
    """Change parts of the manifest."""

    def damage(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return damage


def without_file(file):
    files = json.loads(file.read_text())["files"]
    saying(files={"state.json": files["state.json"]})(file)


def holding(text):
    return lambda file: file.write_text(text)


FILES = {
    "a bit of the first tensor": (TENSORS, flip(0.6), f"{TENSORS} is not what was written: its SHA-256"),
    "a bit of its header": (TENSORS, flip(0.2), f"{TENSORS} is not what was written"),
    "the first bit": (TENSORS, flip(0), f"{TENSORS} is not what was written"),
    "the last bit": (TENSORS, flip(1), f"{TENSORS} is not what was written"),
    "tensors cut off": (TENSORS, cut, rf"{TENSORS} has \d+ bytes, of \d+ that were written"),
    "empty tensors": (TENSORS, empty, f"{TENSORS} has 0 bytes"),
    "no tensors": (TENSORS, gone, f"{TENSORS} is missing"),
    "a folder for tensors": (TENSORS, folder_instead, f"{TENSORS} has|{TENSORS} cannot be read"),
    "a bit of the state": ("state.json", flip(0.5), "state.json is not what was written"),
    "an empty state": ("state.json", empty, "state.json has 0 bytes"),
    "no state": ("state.json", gone, "state.json is missing"),
    "a bit of the manifest": ("manifest.json", flip(0.5), "manifest.json|is missing in the state"),
    "a bit of its first line": ("manifest.json", flip(0), "manifest.json cannot be read"),
    "a manifest cut off": ("manifest.json", cut, "manifest.json cannot be read"),
    "an empty manifest": ("manifest.json", empty, "manifest.json cannot be read"),
    "no manifest": ("manifest.json", gone, "it has no manifest.json: .* earlier posttrain.* not read"),
    "a folder for a manifest": ("manifest.json", folder_instead, "manifest.json cannot be read"),
    "a manifest of garbage": ("manifest.json", lambda f: f.write_bytes(b"\xff\x00"), "cannot be read"),
    "a manifest that is a list": ("manifest.json", holding("[]"), "is damaged: the whole"),
    "a manifest of nothing": ("manifest.json", holding("{}"), "is damaged: format: Field required"),
    "a later format": ("manifest.json", saying(format=3), "the format 3 of another posttrain; this one reads 2"),
    "an earlier format": ("manifest.json", saying(format=1), "the format 1 of another posttrain; this one reads 2"),
    "a format in words": ("manifest.json", saying(format="x"), "is damaged: format"),
    "a manifest without files": ("manifest.json", saying(files={}), r"lists the files \[\], not \['state.json'\]"),
    "a manifest without a file": ("manifest.json", without_file, r"lists the files \['state.json'\], not|is missing in the state|values are missing"),
    "something more": ("manifest.json", saying(more=1), "is damaged: more: Extra inputs"),
    "a step in words": ("manifest.json", saying(step="6"), "is damaged: step: Input should be a valid integer"),
    "a size in words": ("manifest.json", saying(files={"state.json": {"size": "1", "sha256": ""}}), r"files\.state\.json\.size: Input"),
    "more of a file": ("manifest.json", saying(files={"state.json": {"size": 1, "sha256": "", "x": 1}}), r"files\.state\.json\.x: Extra"),
    "another step": ("manifest.json", saying(step=8), "the state is of step 6, and manifest.json says 8"),
    "another run's manifest": ("manifest.json", saying(fingerprint="x"), "it is of another run, or of a stage"),
}  # fmt: skip


def without(*starts):
    """Leave out the tensors whose path starts so."""

    def change(tensors, values):
        for path in [path for path in tensors if path.startswith(starts)]:
            del tensors[path]

    return change


def with_tensor(path, change):
    """Put another tensor in the place of ``path``: what ``change`` makes of the first weight."""

    def changed(tensors, values):
        tensors[path] = whole_piece(change(tensors[f"trained/{FIRST}"].values))

    return changed


def with_piece(start, stop):
    """Have only a part of the first weight."""

    def change(tensors, values):
        whole = tensors[f"trained/{FIRST}"]
        tensors[f"trained/{FIRST}"] = Piece(whole.values.flatten()[start:stop], whole.shape, start)

    return change


def with_values(**changed):
    return lambda tensors, values: values.update(changed)


def without_value(name, inner=None):
    return lambda tensors, values: (values[inner] if inner else values).pop(name)


def whole_piece(tensor):
    return Piece(tensor, tensor.shape)


STATES = {
    "no weights": (without("trained"), f"trained/{FIRST} and 3 more values are missing", "holds other weights"),
    "a weight less": (without(f"trained/{FIRST}"), f"trained/{FIRST} is missing", "holds other weights"),
    "no role": (without("roles"), "roles/ema/.* and 3 more values are missing", r"holds the roles \[\]"),
    "a tensor of a role less": (without(f"roles/ema/{FIRST}"), f"roles/ema/{FIRST} is", "the role 'ema' holds other"),
    "no optimizer": (without("optimizer"), "optimizer/.* more values are missing", "is empty after 6 steps"),
    "moments of one weight less": (without(f"optimizer/{FIRST}"), f"optimizer/{FIRST}/step and 2 more", None),
    "moments of another weight": (with_tensor("optimizer/x/m", torch.clone), "optimizer/x/m is in the state, and not", "of other weights"),
    "no place in the data": (without_value("next_batch", "extra"), "extra/next_batch is missing", None),
    "no account": (without_value("extra"), "state.json is no training state: extra: Field required", "extra: Field"),
    "no bill": (without_value("forward_equivalents"), "no training state: forward_equivalents", "Field required"),
    "no step": (without_value("step"), "state.json is no training state: step: Field required", "step: Field"),
    "something more": (with_values(more=1), "state.json is no training state: more: Extra", "more: Extra"),
    "a step in words": (with_values(step="6"), "is no training state: step: Input should be", "step: Input"),
    "a tensor of no part": (with_tensor("more", torch.clone), "more is no part of a training state", "more is no"),
    "a tensor of no part below": (with_tensor("trained/a/b", torch.clone), "trained/a/b is no part", "a/b is no"),
    "a weight in half precision": (with_tensor(f"trained/{FIRST}", torch.Tensor.half), f"trained/{FIRST} is float16 .*, and float32", "holds other weights"),
    "a smaller weight": (with_tensor(f"trained/{FIRST}", lambda t: t[:-1]), f"trained/{FIRST} is float32 .*31", "holds other weights"),
    "the first part of a weight": (with_piece(0, 100), "trained/0.weight is not whole: 100 of its 256 numbers are there", "not whole"),
    "the last part of a weight": (with_piece(100, 256), "trained/0.weight is not whole: number 0 is not there", "not whole"),
    "another step": (with_values(step=8), None, "the state is of step 8, and manifest.json says 6"),
}  # fmt: skip


def seal(checkpoint, keys=False):
    """Let the manifest have the hash of what is there now, and ``keys`` as well."""
    files = {}
    for file in (checkpoint / "state.json", checkpoint / TENSORS):
        content = file.read_bytes()
        files[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    tensors = {n: kind_of(p.values.dtype, p.shape) for n, p in read_pieces(checkpoint / TENSORS).items()}
    now = {**dict(keys_of(json.loads((checkpoint / "state.json").read_bytes()))), **tensors}
    saying(files=files, **({"keys": now} if keys else {}))(checkpoint / "manifest.json")


def assert_passed_over(path, why, suffix="damaged"):
    """The newest checkpoint is named, set aside and passed over; the one before is restored to the bit."""
    policy, strategy = started(seed=3)
    sentences = []
    found = folder_of(path, policy, strategy, "one", sentences).restore()
    assert (found.step, found.extra["next_batch"]) == (4, 4)
    (told,) = sentences
    assert re.search(f"step-00000006' is passed over: .*{why}.*. It is now 'step-00000006.{suffix}'", told), (
        told
    )
    names = [f"step-0000000{name}" for name in ("2", "4", f"6.{suffix}")]
    assert sorted(p.name for p in path.iterdir()) == names
    kept = whole_state(path / names[1])
    assert same(state(policy)[None], kept["trained"])
    assert same(state(policy)["ema"], kept["roles"]["ema"])
    assert folder_of(path, policy, strategy, "one").restore().step == 4, "and it is told once"


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained / "one", tmp_path / "checkpoints")


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(folder, damage):
    name, change, why = FILES[damage]
    change(folder / "step-00000006" / name)
    assert_passed_over(folder, why, "foreign" if "another run" in damage else "damaged")


@pytest.mark.parametrize("damage", STATES)
@pytest.mark.parametrize("mended", ["nothing", "the hash", "the hash and the keys"])
def test_a_changed_state_is_named_and_the_checkpoint_before_is_used(folder, damage, mended):
    change, by_its_keys, by_the_stage = STATES[damage]
    newest = folder / "step-00000006"
    tensors, values = read_pieces(newest / TENSORS), json.loads((newest / "state.json").read_text())
    tensors = {path: piece.copied() for path, piece in tensors.items()}  # their file is written again
    change(tensors, values)
    write_pieces(newest / TENSORS, tensors)
    (newest / "state.json").write_text(json.dumps(values))
    if mended == "nothing":
        assert_passed_over(folder, r"state.json has|tensors-1-of-1.safetensors (has|is not)")
        return
    whole = mended == "the hash and the keys"
    seal(newest, keys=whole)
    why = by_the_stage if whole or by_its_keys is None else by_its_keys
    if why is not None:  # else what the account holds is the stage's to know
        assert_passed_over(folder, why)


@pytest.mark.parametrize(
    ("text", "why"), [("[1]", "no training state"), ("{", "cannot be read"), ("é", "read")]
)
def test_a_state_that_is_no_state_is_named(folder, text, why):
    newest = folder / "step-00000006"
    content = text.encode("latin-1")
    (newest / "state.json").write_bytes(content)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    files["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    saying(files=files)(newest / "manifest.json")
    assert_passed_over(folder, f"state.json .*{why}")


def test_a_pickle_in_the_place_of_tensors_is_not_run(folder, tmp_path):
    newest = folder / "step-00000006"
    torch.save({"code": Opened(tmp_path / "run")}, newest / TENSORS)
    content = (newest / TENSORS).read_bytes()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    files[TENSORS] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    saying(files=files)(newest / "manifest.json")
    assert_passed_over(folder, f"{TENSORS} cannot be read")
    assert not (tmp_path / "run").exists()


class Opened:
    """Its pickle makes a file where it is read."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


OTHERS = {
    "another run's checkpoint": ("other", "step-00000006", "it is of another run", "foreign"),
    "an older one under its name": ("one", "step-00000004", "it is of step 4", "damaged"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_checkpoint_of_the_same_shapes_is_not_taken(trained, folder, kind):
    run, step, why, suffix = OTHERS[kind]
    shutil.rmtree(folder / "step-00000006")
    shutil.copytree(trained / run / step, folder / "step-00000006")
    assert_passed_over(folder, why, suffix)


def test_the_state_of_another_run_in_a_checkpoint_is_not_taken(trained, folder):
    shutil.copy(trained / "other" / "step-00000006" / TENSORS, folder / "step-00000006")
    assert_passed_over(folder, f"{TENSORS} is not what was written: its SHA-256 differs")


def test_a_disk_that_cannot_read_a_file_is_told(folder, monkeypatch):
    def broken(file, name, digest=hashlib.file_digest):
        if "step-00000006" in file.name:
            raise OSError(5, "Input/output error")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", broken)
    assert_passed_over(folder, "state.json cannot be read: .*Input/output error")


def test_an_empty_folder_is_no_checkpoint(folder):
    for file in (folder / "step-00000006").iterdir():
        file.unlink()
    assert_passed_over(folder, "it has no manifest.json")


def test_a_name_that_is_taken_gets_a_number(folder):
    (folder / "step-00000006.damaged").mkdir()
    gone(folder / "step-00000006" / TENSORS)
    told = []
    folder_of(folder, *started(), "one", told).restore()
    assert told[0].endswith("now 'step-00000006.damaged-2'")


def test_one_that_cannot_be_renamed_is_an_error(folder, monkeypatch):
    gone(folder / "step-00000006" / TENSORS)

    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PosttrainError, match=r"cannot write .*step-00000006': .*Read-only"):
        folder_of(folder, *started(), "one").restore()


def test_where_none_can_be_used_all_are_named_with_their_reasons_and_stay(folder):
    cut(folder / "step-00000002" / TENSORS)
    gone(folder / "step-00000004" / "manifest.json")
    (folder / "step-00000006" / "manifest.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(PosttrainError) as found:
            folder_of(folder, *started(), "one").restore()
        words = str(found.value)
        assert words.startswith(
            f"no checkpoint in {str(folder)!r} can be used: step-00000006: manifest.json is"
        )
        assert "; step-00000004: it has no manifest.json" in words
        assert f"; step-00000002: {TENSORS} has" in words
        assert words.endswith(f"or begin the stage anew: posttrain run RECIPE --fresh {folder.parent.name}")
        assert sorted(folder.rglob("*")) == before


def test_the_main_process_decides_and_all_follow(folder):
    flip(0.5)(folder / "step-00000006" / TENSORS)

    def work(world):
        policy, strategy = started(seed=world.rank, world=world)
        told = []
        found = folder_of(folder, policy, strategy, "one", told).restore()
        return found.step, len(told), state(policy)[None]

    first, second = on_ranks(2, work)
    assert (first[:2], second[:2]) == ((4, 1), (4, 0))
    assert same(first[2], second[2])
    for path in saved(folder):
        empty(path / TENSORS)
    with pytest.raises(PosttrainError, match=r"no checkpoint in .* can be used"):
        on_ranks(2, work)


TINY = TRAIN.replace("{steps: 6", "{keep_checkpoints: 3, steps: 6")


def test_a_run_tells_of_a_damaged_checkpoint_and_ends_with_the_same_bits(tmp_path):
    made, run = recipe(stage("sft", train=TINY)), tmp_path / "run"
    run_quietly(made, run)
    final, checkpoints = run / "sft" / "final", run / "sft" / "checkpoints"
    files = {p: p.read_bytes() for p in final.rglob("*") if p.is_file()}
    shutil.rmtree(final)
    (run / "sft" / "stage.json").unlink()
    last = checkpoints / "step-00000006"
    flip(0.5)(last / TENSORS)
    with pytest.raises(
        ModelError, match=r"step-00000006' cannot be used: tensors-1-of-1.safetensors is not what was written"
    ):
        open_artifact(str(last), torch.device("cpu"))
    printed = run_quietly(made, run)
    assert printed.count("sft: the checkpoint") == 1
    assert "step-00000006' is passed over: tensors-1-of-1.safetensors is not what was written" in printed
    assert "sft: going on after step 4" in printed
    assert {p: p.read_bytes() for p in final.rglob("*") if p.is_file()} == files
    with pytest.raises(ModelError, match="cannot be used"):
        open_artifact(f"{last}.damaged", torch.device("cpu"))
    (run / "sft" / "stage.json").unlink()
    for path in saved(checkpoints):
        gone(path / TENSORS)
    with pytest.raises(
        PosttrainError,
        match=r"no checkpoint in .* can be used: step-00000006: tensors-1-of-1.safetensors is missing",
    ):
        run_quietly(made, run)
    shutil.rmtree(checkpoints)
    run_quietly(made, run)
    assert {p: p.read_bytes() for p in final.rglob("*") if p.is_file()} == files
