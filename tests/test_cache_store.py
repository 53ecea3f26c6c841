"""Tests that the store loses no entry, reads no damaged one, and stays within its limit beside other processes."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from posttrain.cache import store as module
from posttrain.cache.contents import clear, contents
from posttrain.cache.room import Demand, Room
from posttrain.cache.settings import UNITS, Cache, size_in_bytes
from posttrain.cache.store import Store
from posttrain.errors import ModelError, PosttrainError
from posttrain.support.files import STALE_SECONDS

FORK = multiprocessing.get_context("fork")


def entry(number, size=250):
    generator = torch.Generator().manual_seed(number)
    return {"a": torch.randn(size, generator=generator), "b": torch.randn(2, 3, generator=generator)}


def open_store(root, limit=10**9, name="things-0", dtype=None, warned=None):
    warned = [] if warned is None else warned
    return Store(Room(root, limit), name, {"kind": "things"}, dtype, warned.append)


def filled(root, numbers, **settings):
    store = open_store(root, **settings)
    for number in numbers:
        store.add(str(number), entry(number), "it")
        if len(store._pending) == 4:
            store.flush()
    store.flush()
    return store


def assert_holds(store, numbers, dtype=torch.float32):
    for number in numbers:
        read = store.read(str(number))
        assert read is not None
        for name, tensor in entry(number).items():
            assert torch.equal(read[name], tensor.to(dtype).float()), number


def damage(file):
    """Change the last byte, which is a tensor's."""
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        byte = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([byte[0] ^ 1]))


def test_every_entry_is_read_as_it_was_added_by_this_process_and_by_others(tmp_path):
    store = filled(tmp_path, range(10))
    assert_holds(store, range(10))
    assert_holds(open_store(tmp_path), range(10))
    assert store.read("10") is None
    assert "9" in store
    assert "10" not in store


def test_a_file_may_be_read_by_whom_the_user_lets_read_files(tmp_path):
    before = os.umask(0o027)
    try:
        store = filled(tmp_path, range(2))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in store.folder.iterdir()} == {0o640}


def test_an_added_entry_can_be_read_before_it_is_written(tmp_path):
    store = open_store(tmp_path, dtype=torch.bfloat16)
    store.add("1", entry(1), "it")
    assert_holds(store, [1], torch.bfloat16)
    store.flush()
    assert_holds(store, [1], torch.bfloat16)


def test_small_entries_are_read_from_their_file_once_and_large_ones_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_ENTRY", 1024)  # an entry of 250 + 6 float32 values
    monkeypatch.setattr(module, "HELD_BYTES", 2048)
    filled(tmp_path, range(3))
    store, read = open_store(tmp_path), []
    whole = module.Shard.read
    monkeypatch.setattr(module.Shard, "read", lambda shard, key: read.append(key) or whole(shard, key))
    for _ in range(2):
        assert_holds(store, range(3))
    assert read == ["0", "1", "2", "2"], "two fit"
    monkeypatch.setattr(module, "HELD_ENTRY", 1023)
    store = open_store(tmp_path)
    read.clear()
    for _ in range(2):
        assert_holds(store, range(1))
    assert read == ["0", "0"]


def test_bf16_halves_the_size_and_leaves_what_is_no_larger(tmp_path):
    sizes = {}
    for dtype in (None, torch.bfloat16):
        store = open_store(tmp_path / str(dtype), dtype=dtype)
        store.add("x", {"wide": torch.randn(5000), "half": torch.ones(4, dtype=torch.float16)}, "it")
        store.flush()
        read = open_store(tmp_path / str(dtype), dtype=dtype).read("x")
        assert [t.dtype for t in read.values()] == [torch.float16, torch.float32]
        (file,) = store.folder.glob("*.safetensors")
        sizes[dtype] = file.stat().st_size
    assert sizes[torch.bfloat16] == pytest.approx(sizes[None] / 2, rel=0.02)


def test_a_size_is_never_announced_smaller_than_it_becomes(tmp_path):
    for dtype in (None, torch.bfloat16):
        store = filled(tmp_path / str(dtype), range(8), dtype=dtype)
        written = sum(file.stat().st_size for file in store.folder.glob("*.safetensors"))
        assert written <= 8 * module.size_of(entry(0), dtype) <= written + 8 * module.HEADER_BYTES


def test_a_store_learns_of_what_others_write_and_does_not_write_it_again(tmp_path):
    one, other = open_store(tmp_path), filled(tmp_path, range(3))
    assert "2" not in one
    assert_holds(one, range(3))  # looked for again
    one.add("2", entry(2), "it")
    one.flush()
    assert len(list(other.folder.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("harm", ["byte", "end", "header", "empty", "foreign"])
def test_a_damaged_file_is_told_removed_and_written_anew(tmp_path, harm):
    store = filled(tmp_path, range(8))
    bad, _ = sorted(store.folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns)
    lost, kept = (range(4), range(4, 8)) if "0" in module.Shard(bad).checksums else (range(4, 8), range(4))
    if harm == "byte":
        damage(bad)
    elif harm == "end":
        os.truncate(bad, bad.stat().st_size - 100)
    elif harm == "header":
        bad.write_bytes(b"\xff" * 50 + bad.read_bytes()[50:])
    elif harm == "empty":
        bad.write_bytes(b"")
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(3)}, bad)
    warned = []
    store = open_store(tmp_path, warned=warned)
    assert_holds(store, kept)
    entries = [store.read(str(n)) for n in lost]
    # the checksum is an entry's, so an entry before the damage may have been read
    assert None in entries
    assert len(warned) == 1
    assert str(bad) in warned[0]
    assert not bad.exists()
    for number in lost:
        store.add(str(number), entry(number), "it")
    store.flush()
    assert_holds(open_store(tmp_path, warned=warned), range(8))
    assert len(warned) == 1


def test_a_file_of_another_store_is_refused_though_its_keys_are_the_same(tmp_path):
    other = filled(tmp_path, range(2), name="things-1")
    (file,) = other.folder.glob("*.safetensors")
    (tmp_path / "things-0").mkdir()
    shutil.copy(file, tmp_path / "things-0")
    warned = []
    assert "1" not in open_store(tmp_path, warned=warned)
    assert "it belongs to the store 'things-1'" in warned[0]
    assert_holds(open_store(tmp_path, name="things-1"), range(2))


def test_what_is_not_finite_is_neither_kept_nor_read(tmp_path, monkeypatch):
    store, spoiled = open_store(tmp_path), {"a": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ModelError, match=r"the encoding of the prompt 'x' is not finite \(a\)"):
        store.add("x", spoiled, "the prompt 'x'")
    with monkeypatch.context() as patch:
        patch.setattr(module, "not_finite", lambda entry: [])
        store.add("x", spoiled, "it")
    store.flush()
    warned = []
    assert open_store(tmp_path, warned=warned).read("x") is None
    assert "not finite" in warned[0]


def test_a_damaged_entry_is_read_from_another_file_that_has_it(tmp_path):
    one, two = open_store(tmp_path), open_store(tmp_path)
    one.add("1", entry(1), "it")
    two.add("1", entry(1), "it")
    two.add("0", entry(0), "it")  # before the other, so that the last byte is that one's in either file
    two._write(two._pending)  # as if both had looked at the same moment
    one._write(one._pending)
    warned = []
    store = open_store(tmp_path, warned=warned)
    damage(store._shard_of["1"])
    assert_holds(store, [1])
    assert len(warned) == 1


def test_a_file_that_another_process_removes_can_still_be_read(tmp_path):
    store = filled(tmp_path, range(4))
    shutil.rmtree(tmp_path / "things-0")
    assert_holds(store, range(4))


def _fill_slowly(root, numbers, pause):
    store = open_store(root)
    for number in numbers:
        if str(number) not in store:
            store.add(str(number), entry(number), "it")
        if len(store._pending) == 4:
            store.flush()
        time.sleep(pause)
    store.flush()


def test_two_processes_fill_one_store_at_once(tmp_path):
    numbers = list(range(200))
    workers = [
        FORK.Process(target=_fill_slowly, args=(tmp_path, part, 0))
        for part in (numbers, numbers[::-1], numbers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    warned = []
    assert_holds(open_store(tmp_path, warned=warned), numbers)
    assert warned == []


@pytest.mark.parametrize("after", [2, 9, 23])
def test_a_process_killed_at_any_moment_leaves_a_store_that_goes_on(tmp_path, after):
    worker = FORK.Process(target=_fill_slowly, args=(tmp_path, range(10_000), 0))
    worker.start()
    folder = tmp_path / "things-0"
    while len(list(folder.glob("*.safetensors"))) < after:
        time.sleep(0.001)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    warned = []
    store = open_store(tmp_path, warned=warned)
    written = [n for n in range(10_000) if str(n) in store]
    assert len(written) >= 4 * after
    assert_holds(store, written)
    assert_holds(filled(tmp_path, range(max(written) + 9)), range(max(written) + 9))
    assert warned == []


def test_only_parts_that_no_living_process_can_be_writing_are_removed(tmp_path):
    folder = filled(tmp_path, range(1)).folder
    fresh, stale = folder / ".a.1.part", folder / ".b.2.part"
    for part in (fresh, stale):
        part.write_bytes(b"half")
    os.utime(stale, (0, time.time() - 2 * STALE_SECONDS))
    assert_holds(open_store(tmp_path), range(1))
    assert fresh.exists()
    assert not stale.exists()


def names(root):
    store = open_store(root)
    return {key for key in map(str, range(100)) if key in store}


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for number in range(3):
        filled(tmp_path, [number])
    (kept,) = contents(tmp_path)
    limit = int(kept.size * 4.1 / 3)
    for shard in tmp_path.rglob("*.safetensors"):
        os.utime(shard, (0, 0))  # the clocks of file systems are coarse
    open_store(tmp_path).use(["0"])
    for number in range(3, 6):
        filled(tmp_path, [number], limit=limit)
    assert sum(kept.size for kept in contents(tmp_path)) <= limit
    assert names(tmp_path) == {"0", "3", "4", "5"}


def test_the_room_is_shared_by_all_stores_of_a_folder(tmp_path):
    limit = 3 * module.size_of(entry(0), None)
    filled(tmp_path, [0], limit=limit, name="old-0")
    filled(tmp_path, [1, 2, 3], limit=limit, name="new-0")
    assert open_store(tmp_path, limit, "old-0").read("0") is None
    assert_holds(open_store(tmp_path, limit, "new-0"), [1, 2, 3])


def test_what_this_process_uses_is_not_removed_by_it(tmp_path):
    limit = 3 * module.size_of(entry(0), None)
    store = filled(tmp_path, [0, 1, 2], limit=limit)
    for number in range(3, 9):
        store.add(str(number), entry(number), "it")
    with pytest.raises(PosttrainError, match=r"full of what this run uses: raise cache.max_size"):
        store.flush()
    assert_holds(open_store(tmp_path), [0, 1, 2])
    assert list(store.folder.glob(".*part")) == []


def reserve(room, needed, missing):
    room.reserve(room.root, Demand("s: prompts", 10, 5, needed, missing), Console(quiet=True))


def test_what_does_not_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    room = Room(tmp_path, 3_000_000)
    reserve(room, 2_000_000, 1_000_000)
    with pytest.raises(PosttrainError, match=r"10 encodings take 1.5 MB.*beside them 3.5 MB.*max_size, 3 MB"):
        reserve(room, 1_500_000, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=500))
    with pytest.raises(PosttrainError, match=r"5 kB are to be cached in .* 500 B free"):
        reserve(Room(tmp_path, 3_000_000), 5000, 5000)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    store = open_store(tmp_path)
    store.add("1", entry(1), "it")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(PosttrainError, match=r"cannot write the cache .*: the disk is full; see cache.path"):
        store.flush()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PosttrainError, match="cannot write the cache"):
        open_store(tmp_path / "file")


def test_clearing_removes_the_cache_and_nothing_else(tmp_path):
    filled(tmp_path, range(4))
    (tmp_path / "mine").mkdir()
    for file in (tmp_path / "mine" / "a.safetensors", tmp_path / "things-0" / "note.txt"):
        file.write_text("keep")
    assert clear(tmp_path) > 4000
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        ".lock",
        "a.safetensors",
        "note.txt",
    ]
    assert clear(tmp_path) == 0


def test_weights_beside_the_stores_are_neither_counted_nor_removed(tmp_path):
    (shard,) = filled(tmp_path / "other", range(4)).folder.glob("*.safetensors")
    weights = tmp_path / "sd3" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(5000))
    os.utime(weights, (1, 1))  # used longest ago
    filled(tmp_path, range(4), limit=shard.stat().st_size + 100)
    assert weights.is_file()
    (weights.parent / "about.json").write_text('["mine"]')
    (tmp_path / "things-0" / "about.json").write_text("[damaged")
    assert [(store.folder.name, store.files, store.about) for store in contents(tmp_path)] == [
        ("things-0", 1, {})
    ]
    clear(tmp_path)
    assert sorted(path.name for path in weights.parent.iterdir()) == ["about.json", "model.safetensors"]
    assert not (tmp_path / "things-0").exists()


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit_in_any_case(number, unit, space):
    for text in (
        f"{number}{space}{unit}",
        f"{number}{space}{unit}".lower(),
        f" {number}.0{space}{unit.upper()} ",
    ):
        assert size_in_bytes(text) == number * UNITS[unit]


@given(st.text())
def test_any_other_text_is_refused_and_nothing_breaks(text):
    with contextlib.suppress(ValueError):
        assert size_in_bytes(text) >= 0


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder() == tmp_path / "posttrain"
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Cache().folder() == tmp_path / ".cache" / "posttrain"
