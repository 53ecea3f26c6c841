"""Every part of a training state is in its checkpoint, and the right checkpoints stay."""

import os

import pytest
import torch
from lines import Line, descending
from ranks import on_ranks
from toys import ToyModel

from posttrain.distributed.world import ALONE
from posttrain.engine import checkpoint
from posttrain.errors import PosttrainError
from posttrain.optim.settings import Train
from posttrain.parallel.single import Alone, Single
from posttrain.parallel.strategy import Layout
from posttrain.policy import Policy

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


def state(policy):
    roles = {name: {n: t.clone() for n, t in policy.gathered_weights(name)} for name in policy.roles}
    return {None: {n: t.detach().clone() for n, t in policy.gathered_weights(None)}, **roles}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_state_comes_back_whole_and_goes_on_to_the_same_bits(tmp_path):
    policy, strategy = started(steps=3)
    target = checkpoint.save(tmp_path, 3, policy, strategy, EXTRA, keep=2)
    assert target == tmp_path / "step-00000003"
    kept = state(policy)
    other, resumed = started(seed=1)
    fresh = state(other)
    assert checkpoint.restore(target, other, resumed) == (3, EXTRA)
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
    kept = checkpoint.read(checkpoint.save(tmp_path, 5, policy, strategy, EXTRA, keep=1), torch.device("cpu"))
    assert set(kept) == {"step", "trained", "roles", "optimizer", "forward_equivalents", "extra"}
    assert (kept["step"], kept["forward_equivalents"], kept["extra"]) == (5, 7, EXTRA)
    assert set(kept["roles"]) == {"ema"}
    assert set(kept["optimizer"]) == set(kept["trained"]) == set(policy.trained)
    assert not any(t.requires_grad for t in kept["trained"].values())
    for moments in kept["optimizer"].values():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_state_before_the_first_step_has_no_moments_and_comes_back(tmp_path):
    policy, strategy = started()
    target = checkpoint.save(tmp_path, 0, policy, strategy, {}, keep=1)
    other, resumed = started(seed=1)
    assert checkpoint.restore(target, other, resumed) == (0, {})
    assert not resumed.optimizer.state
    assert same(state(other)[None], state(policy)[None])


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.saved(folder)]


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [
        (1, None, [8]),
        (2, None, [6, 8]),
        (3, None, [4, 6, 8]),
        (9, None, [2, 4, 6, 8]),
        (1, 2, [2, 8]),
        (1, 8, [8]),
        (2, 4, [4, 6, 8]),
        (1, 0, [8]),
    ],
)
def test_the_last_are_kept_and_the_one_that_is_protected(tmp_path, keep, protected, left):
    policy, strategy = started()
    for step in (2, 4, 6, 8):
        checkpoint.save(tmp_path, step, policy, strategy, {}, keep, protected)
    assert steps(tmp_path) == left
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_only_whole_checkpoints_count_oldest_first(tmp_path):
    assert checkpoint.saved(tmp_path / "none") == []
    for name in ("step-00000010", "step-00000009", "other-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").touch()
    (tmp_path / "step-00000011").mkdir()
    assert steps(tmp_path) == [9, 10]


def test_a_step_that_is_saved_again_replaces_the_one_before(tmp_path):
    policy, strategy = started()
    for extra in ({"n": 1}, {"n": 2}):
        target = checkpoint.save(tmp_path, 3, policy, strategy, extra, keep=1)
        (target / "left").touch()
    assert checkpoint.read(target, torch.device("cpu"))["extra"] == {"n": 2}
    assert checkpoint.save(tmp_path, 3, policy, strategy, {}, keep=1) == target
    assert [p.name for p in target.iterdir()] == ["state.pt"]


def test_ranks_write_once_and_the_account_is_their_sum(tmp_path):
    def work(world):
        policy, strategy = started(steps=1 + world.rank, world=world)
        target = checkpoint.save(tmp_path, 2, policy, strategy, {"rank": world.rank}, keep=1)
        assert (target / "state.pt").is_file(), "nobody goes on before it is there"
        other, resumed = started(world=world)
        step, extra = checkpoint.restore(target, other, resumed)
        return step, extra, other.forward_equivalents, state(other)[None], state(policy)[None]

    (first, second) = on_ranks(2, work)
    assert first[:3] == (2, {"rank": 0}, 7 + 14)
    assert second[:3] == (2, {"rank": 0}, 0)
    assert same(first[3], first[4])
    assert same(second[3], first[4]), "the main process's weights"
    saved = torch.load(tmp_path / "step-00000002" / "state.pt", weights_only=True)
    assert all(t.device.type == "cpu" for t in saved["trained"].values())


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
    target = checkpoint.save(tmp_path, 1, policy, strategy, {}, keep=1)
    checkpoint.restore(target, policy, strategy)
    assert strategy.calls == ["loaded", ["a"]]


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_checkpoint_of_other_weights_is_refused(tmp_path, change):
    policy, strategy = started()
    target = checkpoint.save(tmp_path, 1, policy, strategy, {}, keep=1)
    kept = torch.load(target / "state.pt", weights_only=True)
    first = next(iter(kept["trained"]))
    tensor = kept["trained"].pop(first)
    kept["trained"]["other" if change == "name" else first] = tensor if change == "name" else tensor[:-1]
    torch.save(kept, target / "state.pt")
    with pytest.raises(PosttrainError, match=r"step-00000001' holds other weights .*\(4 tensors, not 4"):
        checkpoint.restore(target, policy, strategy)
    small = Policy(Line())
    with pytest.raises(PosttrainError, match=r"\(4 tensors, not 1, or other shapes: another LoRA rank\?\)"):
        checkpoint.restore(target, small, descending(small))


def test_a_checkpoint_that_cannot_be_read_says_which(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(PosttrainError, match=r"cannot read the checkpoint .*Remove it to continue") as found:
        checkpoint.read(tmp_path, torch.device("cpu"))
    assert found.value.__cause__ is not None


def test_room_is_asked_for_the_bytes_of_all_tensors_and_nothing_else(tmp_path, monkeypatch):
    policy, asked, published = Policy(Line()), [], checkpoint.published
    policy.add_role("ema")
    strategy = descending(policy)
    monkeypatch.setattr(
        checkpoint, "published", lambda to, size: (asked.append(size), published(to, size))[1]
    )
    checkpoint.save(tmp_path, 1, policy, strategy, {"n": 1, "text": "x", "rewards": [0.5]}, keep=1)
    # one float32 that is trained, and its role; this optimizer has no moments
    assert asked == [4 + 4]


def test_a_state_is_read_onto_the_device_and_not_into_memory(tmp_path, monkeypatch):
    policy, strategy = started()
    target = checkpoint.save(tmp_path, 1, policy, strategy, {}, keep=1)
    kept = checkpoint.read(target, torch.device("meta"))
    assert {t.device.type for t in kept["trained"].values()} == {"meta"}
    # no code is run that a file brings, even where the environment would let torch run it
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"code": os.path.join}, target / "state.pt")
    with pytest.raises(PosttrainError, match="cannot read"):
        checkpoint.read(target, torch.device("cpu"))
