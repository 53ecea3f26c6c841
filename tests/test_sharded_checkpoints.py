"""Each process writes its own part of a state, any layout reads it, and no process makes the whole."""

import json
import os
import re
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from stored import Made, whole_state
from test_checkpoints import ALL, folder_of, same, state, steps
from toys import ToyModel

from posttrain.distributed.world import ALONE
from posttrain.engine import checkpoint_folder, writing
from posttrain.engine.checkpoint_folder import saved
from posttrain.engine.part_file import read_pieces, write_pieces
from posttrain.errors import PosttrainError
from posttrain.optim.settings import Train
from posttrain.parallel.ddp import DDP
from posttrain.parallel.fsdp2 import FSDP2
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.policy.piece import Piece, Stored


def cut(tensor, places):
    """The tensor in pieces that end at ``places``."""
    ends = sorted({*(p for p in places if p < tensor.numel()), tensor.numel()} - {0})
    flat = tensor.flatten()
    return [Piece(flat[a:b].clone(), tensor.shape, a) for a, b in zip([0, *ends], ends, strict=False)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.integers(0, 64), max_size=4),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_any_range_is_read_from_any_pieces(shape, places, random, data):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(places)))
    tensor = tensor.to(random.choice([torch.float32, torch.float64, torch.bfloat16]))
    pieces = cut(tensor, places) or [Piece(tensor, tensor.shape)]
    random.shuffle(pieces)
    kept = Stored(pieces)
    assert torch.equal(kept.whole(), tensor)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    target = Piece(torch.full((stop - start,), 7.0, dtype=tensor.dtype), tensor.shape, start)
    kept.read(target)
    assert torch.equal(target.values, tensor.flatten()[start:stop])


def test_numbers_are_read_into_memory_of_any_order():
    tensor = torch.randn(4, 6)
    transposed = torch.empty(6, 4).t()
    Stored(cut(tensor, [5, 11])).read(Piece(transposed, tensor.shape))
    assert torch.equal(transposed, tensor)
    assert transposed.stride() == (1, 4)


def test_a_copy_stays_while_training_goes_on():
    weight = torch.nn.Parameter(torch.arange(4.0))
    copy = Piece(weight, weight.shape).copied()
    with torch.no_grad():
        weight.zero_()
    assert copy.values.tolist() == [0, 1, 2, 3]
    assert not copy.values.requires_grad


def test_the_whole_is_the_only_piece_itself_or_of_the_dtype_of_all():
    values = torch.arange(6.0).bfloat16()
    alone = Stored([Piece(values, torch.Size([2, 3]))]).whole()
    assert alone.data_ptr() == values.data_ptr()
    several = Stored(
        [Piece(values[:2], torch.Size([2, 3])), Piece(values[2:], torch.Size([2, 3]), 2)]
    ).whole()
    assert several.dtype == torch.bfloat16
    assert torch.equal(several, alone)


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([(0, 3), (4, 6)], "number 3 is not there"),
        ([(0, 3), (2, 6)], "number 2 is twice there"),
        ([(0, 6), (0, 6)], "number 0 is twice there"),
        ([(1, 6)], "number 0 is not there"),
        ([(0, 5)], "5 of its 6 numbers are there"),
    ],
)
def test_pieces_that_are_no_whole_tensor_are_refused(pieces, why):
    tensor = torch.randn(2, 3)
    with pytest.raises(ValueError, match=why):
        Stored([Piece(tensor.flatten()[a:b], tensor.shape, a) for a, b in pieces])
    shapes = [Piece(torch.zeros(3), torch.Size([2, 3])), Piece(torch.zeros(3), torch.Size([3, 2]), 3)]
    with pytest.raises(ValueError, match=r"of \[2, 3\] and of \[3, 2\]"):
        Stored(shapes)


def test_a_file_of_pieces_is_aligned_and_on_the_disk_when_it_is_described(tmp_path, monkeypatch):
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda number: on_disk.append(os.fstat(number).st_size))
    odd = torch.zeros(3, dtype=torch.uint8)
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    pieces = {
        "a": Piece(odd, odd.shape),
        "b": Piece(weight.data.bfloat16(), weight.shape),
        "c": Piece(weight, weight.shape),
    }
    described = write_pieces(tmp_path / "part", pieces)
    assert on_disk == [described.size]
    content = (tmp_path / "part").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for path, piece in pieces.items():
        assert header[path]["data_offsets"][0] % piece.values.itemsize == 0, path


def test_a_file_of_pieces_is_a_safetensors_file_and_the_same_each_time(tmp_path):
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
    ]
    tensors = {f"a/{i}": torch.arange(5).to(kind) for i, kind in enumerate(kinds)}
    pieces = {path: Piece(t[1:], torch.Size([2, 5]), 6) for path, t in tensors.items()}
    pieces |= {
        "one": Piece(torch.tensor(2.5), torch.Size([])),
        "t": Piece(torch.randn(2, 3).t(), torch.Size([3, 2])),
    }
    described = write_pieces(tmp_path / "a", pieces)
    assert write_pieces(tmp_path / "b", dict(reversed(pieces.items()))) == described
    assert described.size == (tmp_path / "a").stat().st_size
    assert list(read_pieces(tmp_path / "a")) == sorted(pieces)
    found = load_file(tmp_path / "a")
    assert found.keys() == pieces.keys()
    for path, piece in read_pieces(tmp_path / "a").items():
        assert torch.equal(piece.values, pieces[path].values)
        assert torch.equal(found[path], piece.values)
        assert (piece.shape, piece.start, piece.values.dtype) == (
            pieces[path].shape,
            pieces[path].start,
            pieces[path].values.dtype,
        )
        assert piece.values.data_ptr() % piece.values.itemsize == 0
    with safe_open(tmp_path / "a", framework="pt") as opened:
        assert json.loads(opened.metadata()["a/1"]) == {"shape": [2, 5], "start": 6}


MAKING = threading.Lock()
LAYOUTS = {"single": Single, "ddp": DDP, "fsdp2": FSDP2}


def trained(world, layout, seed=0, taken=3):
    """A policy after some steps of AdamW on gradients that the weights decide, the same in every layout."""
    with MAKING:  # the ranks are threads, and share torch's generator
        policy = Policy(ToyModel(seed))
    strategy = LAYOUTS[layout]().prepare(policy, Train(steps=9, learning_rate=0.1), world)
    policy.layout = strategy.layout
    policy.add_role("ema")
    for step in range(taken):
        for parameter in policy.trained.values():
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
        strategy.optimizer.step()
        policy.move_role("ema", 0.5)
    return policy, strategy


def flat(tensors, path=""):
    for name, value in tensors.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}/{name}")
        elif isinstance(value, torch.Tensor):
            yield f"{path}/{name}", value


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The state of one process."""
    path = tmp_path_factory.mktemp("alone")
    with folder_of(path, *trained(ALONE, "single")) as folder:
        folder.save(3, {"n": 1}, ALL)
    return dict(flat(whole_state(saved(path)[0])))


TWO, THREE, ONE = ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 1)


@pytest.mark.parametrize("read", [TWO, THREE, ONE, ("ddp", 2), ("single", 1)], ids=str)
@pytest.mark.parametrize("written", [TWO, THREE, ("ddp", 2), ("single", 1)], ids=str)
def test_any_layout_reads_what_any_other_wrote_to_the_bit(tmp_path, alone, written, read):
    def write(world):
        policy, strategy = trained(world, written[0])
        with folder_of(tmp_path, policy, strategy) as folder:
            folder.save(3, {"n": 1}, ALL)
        return state(policy)

    def go_on(world):
        policy, strategy = trained(world, read[0], seed=1, taken=0)
        with folder_of(tmp_path, policy, strategy) as folder:
            assert folder.restore().extra == {"n": 1}
            folder.save(4, {}, ALL)
        return state(policy)

    held, again = on_ranks(written[1], write, 30)[0], on_ranks(read[1], go_on, 30)[-1]
    assert all(same(held[role], again[role]) for role in (None, "ema"))
    found = []
    for path, (layout, count) in zip(saved(tmp_path), (written, read), strict=True):
        parts = count if layout == "fsdp2" else 1
        assert len(list(path.glob(f"tensors-*-of-{parts}.safetensors"))) == parts
        assert len(list(path.iterdir())) == parts + 2
        found.append(dict(flat(whole_state(path))))
    assert same(*found)
    assert all(torch.allclose(found[0][path], t, atol=1e-6) for path, t in alone.items())


def weights_bytes():
    return 4 * sum(p.numel() for p in ToyModel().transformer.parameters())


def test_no_process_makes_the_whole_of_what_is_in_parts(tmp_path):
    """Beside its own part, which is copied once, and small things."""

    def work(world):
        policy, strategy = trained(world, "fsdp2")
        with folder_of(tmp_path, policy, strategy) as folder:
            with Made() as saving:
                folder.save(3, {}, ALL)
            folder.wait()
            other, into = trained(world, "fsdp2", seed=1, taken=0)
            with Made() as restoring:
                folder_of(tmp_path, other, into).restore()
        return saving, restoring

    weights = weights_bytes()
    for saving, restoring in on_ranks(2, work, 30):
        assert saving.bytes <= 1.1 * 4 * weights / 2, "weights, EMA and two moments"
        assert restoring.bytes <= 1.3 * 2 * weights / 2, "the moments; weights and EMA are there"
        assert max(saving.largest, restoring.largest) <= 4 * 32 * 8 / 2, "half of the largest tensor"
    with Made() as all_of_it:
        whole_state(saved(tmp_path)[0])
    assert all_of_it.bytes >= 4 * weights, "what is put together is counted"
    sizes = [file.stat().st_size for file in saved(tmp_path)[0].glob("tensors*")]
    assert max(sizes) < 1.3 * min(sizes)


def assert_both_say(on_each, words):
    for said in on_each:
        assert words in said, said


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_one_process_is_that_of_all_and_nothing_is_left(tmp_path, monkeypatch, fails):
    write = write_pieces

    def refused(file, pieces):
        if f"tensors-{fails + 1}-" in file.name:
            raise OSError(28, "No space left on device")
        return write(file, pieces)

    monkeypatch.setattr(writing, "write_pieces", refused)

    def work(world):
        folder = folder_of(tmp_path, *trained(world, "fsdp2"))
        folder.save(3, {}, ALL)
        with pytest.raises(PosttrainError) as found:
            folder.wait()
        world.barrier()
        return str(found.value)

    assert_both_say(on_ranks(2, work, 30), "step-00000003': the disk is full")
    assert saved(tmp_path) == []


def test_a_part_that_never_comes_is_told_and_the_checkpoint_before_is_used(tmp_path, monkeypatch):
    """A process is killed while it writes; the main one ends by its own error, as its next exchange fails."""
    monkeypatch.setattr(checkpoint_folder, "GRACE_SECONDS", 0.1)
    write, killed = write_pieces, threading.Event()

    def torn(file, pieces):
        described = write(file, pieces)
        if "step-00000004" in str(file) and "tensors-2" in file.name:
            killed.set()
            threading.Event().wait()
        return described

    monkeypatch.setattr(writing, "write_pieces", torn)

    def work(world):
        told = []
        folder = folder_of(tmp_path, *trained(world, "fsdp2"), told=told)
        folder.save(2, {"n": 2}, ALL)
        folder.save(4, {"n": 4}, ALL)
        assert killed.wait(20)
        if world.is_main:
            with pytest.raises(ZeroDivisionError), folder:
                raise ZeroDivisionError
        world.barrier()
        return told

    told, _ = on_ranks(2, work, 30)
    assert told == [f"cannot write {str(tmp_path / 'step-00000004')!r}: process 1 did not write its part"]

    def go_on(world):
        with folder_of(tmp_path, *trained(world, "fsdp2", taken=0)) as folder:
            found = folder.restore()
            folder.save(6, {}, ALL)
        return found.extra

    assert on_ranks(2, go_on, 30) == [{"n": 2}] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000006"]


def test_the_last_part_may_come_while_the_stage_ends_by_an_error(tmp_path, monkeypatch):
    write, ends = write_pieces, threading.Event()

    def late(file, pieces):
        if "tensors-2" in file.name:
            assert ends.wait(20)
        return write(file, pieces)

    monkeypatch.setattr(writing, "write_pieces", late)

    def work(world):
        folder = folder_of(tmp_path, *trained(world, "fsdp2"))
        folder.save(2, {}, ALL)
        ends.set()
        with pytest.raises(ZeroDivisionError), folder:
            raise ZeroDivisionError

    on_ranks(2, work, 30)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (
            lambda path: (path / "tensors-2-of-2.safetensors").unlink(),
            "tensors-2-of-2.safetensors is missing",
        ),
        (lambda path: without(path, "tensors-2-of-2.safetensors"), r"lists the files .*tensors-1-of-2"),
        (lambda path: twice(path), "is not whole: number 0 is twice there"),
    ],
    ids=["a part is gone", "a part is in no list", "a part twice"],
)
def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path, damage, why):
    def write(world):
        with folder_of(tmp_path, *trained(world, "fsdp2")) as folder:
            folder.save(2, {"n": 2}, ALL)
            folder.save(4, {"n": 4}, ALL)

    on_ranks(2, write, 30)
    damage(saved(tmp_path)[-1])
    told = []
    found = folder_of(tmp_path, *trained(ALONE, "single", taken=0), told=told).restore()
    assert found.extra == {"n": 2}
    assert re.search(f"step-00000004' is passed over: .*{why}", told[0]), told


def change_manifest(path, change):
    content = json.loads((path / "manifest.json").read_text())
    change(content["files"])
    (path / "manifest.json").write_text(json.dumps(content))


def without(path, name):
    (path / name).unlink()
    change_manifest(path, lambda files: files.pop(name))


def twice(path):
    """The first process's part in the place of the second's, hash and all."""
    one, two = (f"tensors-{i}-of-2.safetensors" for i in (1, 2))
    shutil.copy(path / one, path / two)
    change_manifest(path, lambda files: files.update({two: files[one]}))


def test_memory_is_counted_over_all_processes_of_a_machine():
    assert writing.has_room([(10, "a", 40), (10, "a", 41)])
    assert not writing.has_room([(10, "a", 39), (10, "a", 41)])
    assert writing.has_room([(10, "a", 20), (10, "b", 20), (0, "b", None)])
    assert not writing.has_room([(10, "a", 20), (10, "b", 19)])


def test_where_memory_has_no_room_all_processes_wait_for_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "available_memory", lambda device: 0)

    def work(world):
        folder = folder_of(tmp_path, *trained(world, "fsdp2"))
        with Made() as made:
            folder.save(3, {}, ALL)
        assert steps(tmp_path) == [3]
        return made.bytes

    assert max(on_ranks(2, work, 30)) < weights_bytes(), "nothing is copied"
