"""Every part of a training state is in its checkpoint, and the right checkpoints stay."""

import pytest
import torch
from full_disk import most_bytes
from lines import Line, descending
from ranks import on_ranks
from stored import whole_state
from toys import ToyModel

from posttrain.distributed.world import ALONE
from posttrain.engine import writing
from posttrain.engine.checkpoint_folder import CheckpointFolder, Retention, saved
from posttrain.engine.manifest import read_manifest
from posttrain.errors import PosttrainError
from posttrain.optim.settings import Train
from posttrain.parallel.single import Alone, Single
from posttrain.parallel.strategy import Layout
from posttrain.policy import Policy

TENSORS = "tensors-1-of-1.safetensors"
EXTRA = {"account": {"rewards": [0.25, 0.5], "good": 4}, "text": "x"}


def started(seed=0, steps=0, world=ALONE):
    """A policy with a role that moves and one that does not, after some steps of AdamW."""
    policy = Policy(ToyModel(seed))
    strategy = Single().prepare(policy, Train(steps=9, learning_rate=0.1), world)
    policy.add_role("ema")
    policy.add_role("reference", moves=False)
    for step in range(steps):
        go_on(policy, strategy, step)
    return policy, strategy


def go_on(policy, strategy, step):
    """One step, on gradients that the step's number and the weights decide."""
    for parameter in policy.trained.values():
        strategy.backward(((parameter * (step + 1)).sin()).sum())
    strategy.step(1e9)
    policy.move_role("ema", 0.5)
    policy.forward_equivalents += 7


def folder_of(path, policy, strategy, fingerprint="this run", told=None):
    """What the folder tells is added to the list ``told``; if there is none, it may tell nothing."""
    tell = pytest.fail if told is None else told.append
    return CheckpointFolder(path, policy, strategy, fingerprint, tell)


ALL = Retention(last=99)


def put(path, step, policy, strategy, extra, retention=ALL):
    """Write a checkpoint; returns its folder."""
    with folder_of(path, policy, strategy) as folder:
        folder.save(step, extra, retention)
    return path / f"step-{step:08d}"


def back(path, policy, strategy):
    """Restore the newest; returns its step and extra."""
    found = folder_of(path, policy, strategy).restore()
    return found.step, found.extra


def state(policy):
    names = {None: policy.trained, **policy.roles}
    return {role: {n: policy.whole_weight(role, n).clone() for n in own} for role, own in names.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_state_comes_back_whole_and_goes_on_to_the_same_bits(tmp_path):
    policy, strategy = started(steps=3)
    put(tmp_path, 3, policy, strategy, EXTRA)
    assert [path.name for path in saved(tmp_path)] == ["step-00000003"]
    kept = state(policy)
    other, resumed = started(seed=1)
    fresh = state(other)
    assert back(tmp_path, other, resumed) == (3, EXTRA)
    found = state(other)
    assert same(found[None], kept[None])
    assert same(found["ema"], kept["ema"])
    assert same(found["reference"], fresh["reference"]), "what never moves is the stage's to make again"
    assert other.forward_equivalents == policy.forward_equivalents == 21
    for parameter, again in zip(policy.trained.values(), other.trained.values(), strict=True):
        one, two = strategy.optimizer.state[parameter], resumed.optimizer.state[again]
        assert same(one, two)
        assert one["step"] == 3
    for step in (3, 4):
        go_on(policy, strategy, step)
        go_on(other, resumed, step)
    assert same(state(policy)[None], state(other)[None])
    assert same(state(policy)["ema"], state(other)["ema"])


def test_the_parts_of_a_state_by_name(tmp_path):
    policy, strategy = started(steps=1)
    target = put(tmp_path, 5, policy, strategy, EXTRA)
    kept = whole_state(target)
    assert set(kept) == {"step", "trained", "roles", "optimizer", "forward_equivalents", "extra"}
    assert (kept["step"], kept["forward_equivalents"], kept["extra"]) == (5, 7, EXTRA)
    assert set(kept["roles"]) == {"ema"}
    kinds = read_manifest(target).keys
    assert (kinds["step"], kinds["extra/text"], kinds["extra/account/rewards"]) == ("int", "str", "list")
    assert kinds["optimizer/0.weight/step"] == "float32 []"
    assert kinds["roles/ema/0.weight"] == kinds["trained/0.weight"] == "float32 [32, 8]"
    assert set(kept["optimizer"]) == set(kept["trained"]) == set(policy.trained)
    for moments in kept["optimizer"].values():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_state_before_the_first_step_has_no_moments_and_comes_back(tmp_path):
    policy, strategy = started()
    put(tmp_path, 0, policy, strategy, {})
    other, resumed = started(seed=1)
    assert back(tmp_path, other, resumed) == (0, {})
    assert not resumed.optimizer.state
    assert same(state(other)[None], state(policy)[None])


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in saved(folder)]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(1), [8]),
        (Retention(2), [6, 8]),
        (Retention(9), [2, 4, 6, 8]),
        (Retention(1, every=4), [4, 8]),
        (Retention(2, every=4), [4, 6, 8]),
        (Retention(1, every=3), [6, 8]),
        (Retention(1, every=100), [8]),
        (Retention(1, steps=frozenset({2, None})), [2, 8]),
        (Retention(1, steps=frozenset({8})), [8]),
        (Retention(2, steps=frozenset({4, 5})), [4, 6, 8]),
        (Retention(1, every=6, steps=frozenset({2})), [2, 6, 8]),
    ],
)
def test_the_last_are_kept_and_those_with_a_reason(tmp_path, retention, left):
    policy, strategy = started()
    assert sorted(retention.stay([2, 4, 6, 8])) == left
    for step in (2, 4, 6, 8):
        put(tmp_path, step, policy, strategy, {}, retention)
    assert steps(tmp_path) == left
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_none_is_removed_before_the_new_one_is_whole_and_never_the_new_one(tmp_path, monkeypatch):
    policy, strategy = started()
    for step in (7, 8):
        put(tmp_path, step, policy, strategy, {})
    put(tmp_path, 2, policy, strategy, {}, Retention(1))
    assert steps(tmp_path) == [2, 8]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_pieces", full)
    with pytest.raises(PosttrainError, match="the disk is full"):
        put(tmp_path, 9, policy, strategy, {}, Retention(1))
    assert steps(tmp_path) == [2, 8]


def test_what_a_kill_left_of_other_checkpoints_is_removed(tmp_path):
    policy, strategy = started()
    put(tmp_path, 1, policy, strategy, {})
    for name in (".step-00000001.part", ".step-00000003.part"):
        (tmp_path / name / "deep").mkdir(parents=True)
    put(tmp_path, 2, policy, strategy, {}, Retention(1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_what_a_kill_left_to_remove_goes_when_the_run_goes_on(tmp_path):
    policy, strategy = started()
    for step in (1, 2, 3):
        put(tmp_path, step, policy, strategy, {})
    (tmp_path / ".step-00000000.part").mkdir()
    put(tmp_path, 3, policy, strategy, {}, Retention(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_checkpoints_are_folders_with_their_name_oldest_first(tmp_path):
    assert saved(tmp_path / "none") == []
    for name in (
        "step-00000010",
        "step-100000000",
        "step-99999999",
        "other-00000001",
        "step-00000008.damaged",
    ):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [10, 99_999_999, 100_000_000]


def test_a_step_that_has_a_checkpoint_is_not_written_again(tmp_path):
    policy, strategy = started()
    for extra in ({"n": 1}, {"n": 2}):
        target = put(tmp_path, 3, policy, strategy, extra)
    assert back(tmp_path, policy, strategy) == (3, {"n": 1})
    assert sorted(p.name for p in target.iterdir()) == ["manifest.json", "state.json", TENSORS]


def test_later_checkpoints_are_dropped(tmp_path):
    policy, strategy = started()
    for step in (2, 4, 6):
        put(tmp_path, step, policy, strategy, {"n": step})
    folder = folder_of(tmp_path, policy, strategy)
    assert folder.restore(until=5).extra == {"n": 4}
    assert folder.restore(until=4).step == 4
    assert folder.restore(until=1) is None
    folder.drop_after(4)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000004"]


def test_one_process_of_several_drops_checkpoints(tmp_path):
    def work(world):
        folder = folder_of(tmp_path, *started(world=world))
        for step in (2, 4, 6):
            folder.save(step, {}, ALL)
        folder.wait()
        folder.drop_after(2)
        world.barrier()
        return steps(tmp_path)

    assert on_ranks(2, work) == [[2], [2]]


def test_ranks_write_once_and_the_account_is_their_sum(tmp_path):
    def work(world):
        policy, strategy = started(steps=1 + world.rank, world=world)
        target = put(tmp_path, 2, policy, strategy, {"rank": world.rank})
        assert (target / TENSORS).is_file(), "nobody goes on before it is there"
        other, resumed = started(world=world)
        step, extra = back(tmp_path, other, resumed)
        return step, extra, other.forward_equivalents, state(other)[None], state(policy)[None]

    (first, second) = on_ranks(2, work)
    assert first[:3] == (2, {"rank": 0}, 7 + 14)
    assert second[:3] == (2, {"rank": 0}, 0)
    assert same(first[3], first[4])
    assert same(second[3], first[4]), "the main process's weights"
    assert sorted(p.name for p in (tmp_path / "step-00000002").iterdir()) == [
        "manifest.json",
        "state.json",
        TENSORS,
    ]


class Told(Alone):
    def __init__(self, *rest):
        super().__init__(*rest)
        self.calls = []

    def mark_loaded(self):
        self.calls.append("loaded")

    def load_moments(self, moments):
        self.calls.append(sorted(moments))
        super().load_moments(moments)


def test_the_strategy_is_told_that_weights_were_written_and_gets_only_moments_that_are(tmp_path):
    policy = Policy(Line())
    policy.model.transformer.b.requires_grad_(True)
    policy.find_parameters()
    strategy = Told(policy, ALONE, Layout(), torch.optim.AdamW(policy.trained.values()))
    policy.trained["a"].grad = torch.ones(1)
    strategy.optimizer.step()
    put(tmp_path, 1, policy, strategy, {"updates": 1})
    back(tmp_path, policy, strategy)
    assert strategy.calls == ["loaded", ["a"]]


def test_a_checkpoint_of_other_weights_does_not_fit(tmp_path):
    policy, strategy = started()
    put(tmp_path, 1, policy, strategy, {})
    small = Policy(Line())
    with pytest.raises(PosttrainError, match=r"\(4 tensors, not 1, or other shapes: another LoRA rank\?\)"):
        folder_of(tmp_path, small, descending(small)).restore()


def test_room_is_asked_for_the_bytes_of_all_tensors_and_nothing_else(tmp_path, monkeypatch):
    policy, asked, published = Policy(Line()), [], writing.published
    policy.add_role("ema")
    strategy = descending(policy)
    monkeypatch.setattr(
        writing, "published", lambda to, size, mark: (asked.append(size), published(to, size, mark))[1]
    )
    put(tmp_path, 1, policy, strategy, {"n": 1, "text": "x", "rewards": [0.5]})
    # one float32 that is trained, and its role; this optimizer has no moments
    assert asked == [4 + 4]


def test_a_full_disk_is_told_by_its_own_words_and_leaves_nothing(tmp_path):
    policy, strategy = started(steps=1)
    with (
        most_bytes(2000),
        pytest.raises(PosttrainError, match=r"cannot write .*step-00000001'.*File too large"),
    ):
        put(tmp_path, 1, policy, strategy, {})
    assert list(tmp_path.iterdir()) == []
