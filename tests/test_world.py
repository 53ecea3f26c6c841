"""What ranks tell each other, between real ones, and how they are joined."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from posttrain.distributed import world
from posttrain.distributed.world import ALONE, World, joined
from posttrain.errors import PosttrainError
from posttrain.parallel.shares import Share, Shares
from posttrain.support.stopping import Stopped

CPU = torch.device("cpu")


def test_ranks_add_up_collect_and_hear():
    def work(w):
        given = torch.tensor([1.0 + w.rank, 10.0 * w.rank])
        rows = torch.tensor([[0, w.rank], [1, w.rank]])
        everyone = w.gather(rows.T.contiguous().T)
        return (
            w.sum(given).tolist(),
            given.tolist(),
            everyone.tolist(),
            w.local(everyone).tolist(),
            w.gather_objects(("rank", w.rank)),
            w.broadcast(f"from {w.rank}"),
            (w.max(-w.rank), w.max(w.rank)),
            w.is_main,
        )

    rows = [[i, rank] for rank in range(3) for i in range(2)]
    assert on_ranks(3, work) == [
        (
            [6.0, 30.0],
            [1.0 + rank, 10.0 * rank],
            rows,
            [[0, rank], [1, rank]],
            [("rank", 0), ("rank", 1), ("rank", 2)],
            "from 0",
            (0, 2),
            rank == 0,
        )
        for rank in range(3)
    ]


def test_a_sum_is_cut_off_from_the_graph_of_its_parts():
    def work(w):
        return w.sum(torch.ones(2, requires_grad=True)).requires_grad

    assert on_ranks(2, work) == [False, False]


def test_own_needs_no_other_process():
    assert World(2, 3).local(torch.arange(6)).tolist() == [4, 5]
    assert World(0, 3).local(torch.arange(6)).tolist() == [0, 1]
    assert World(1, 2).local(torch.arange(6)).tolist() == [3, 4, 5]


def test_at_a_barrier_all_wait():
    arrived, seen = [], {}
    gate = threading.Event()

    def work(w):
        if w.rank == 0:
            gate.wait(0.2)  # the others would be long through
        arrived.append(w.rank)
        w.barrier()
        seen[w.rank] = len(arrived)

    on_ranks(3, work)
    assert seen == {0: 3, 1: 3, 2: 3}


def test_the_main_process_goes_first():
    order, gate = [], threading.Event()

    def work(w):
        with w.main_first():
            if w.is_main:
                gate.wait(0.2)
            order.append(w.rank)
        w.barrier()

    on_ranks(3, work)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


@pytest.fixture
def nowhere(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_a_process_is_alone_and_makes_no_group(nowhere):
    with joined(CPU) as made:
        assert made is ALONE
        assert not dist.is_initialized()


def test_a_group_for_one_process_is_made_and_let_go(nowhere):
    with joined(CPU, group=True) as made:
        assert made == World(0, 1)
        assert made is not ALONE
        assert dist.get_world_size() == 1
        assert dist.get_backend() == "gloo"
        with joined(CPU, group=True) as inner:
            assert inner == made
        assert dist.is_initialized(), "it belongs to the outer block"
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="inside"), joined(CPU, group=True):
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def test_inside_a_group_a_process_keeps_its_rank(nowhere):
    nowhere.setenv("RANK", "1")
    nowhere.setenv("WORLD_SIZE", "3")
    nowhere.setattr(dist, "is_initialized", lambda: True)
    with joined(CPU) as made:
        assert made == World(1, 3)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT in"),
        ({"MASTER_ADDR": "localhost"}, ", and MASTER_PORT in"),
        ({"MASTER_PORT": "1"}, ", and MASTER_ADDR in"),
    ],
)
def test_a_process_that_cannot_reach_the_others_says_what_is_missing(nowhere, given, missing):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **given}.items():
        nowhere.setenv(name, value)
    with pytest.raises(PosttrainError, match=f"this is process 1 of 2.*{missing}"), joined(CPU):
        pass


class Group:
    """Notes how the process group would be made: there is no second process, nor a GPU, in this test."""

    def __init__(self, monkeypatch, gpus=0):
        self.made, self.device, self.gone = [], None, 0
        monkeypatch.setattr(
            dist, "init_process_group", lambda *args, **named: self.made.append((args, named))
        )
        monkeypatch.setattr(dist, "destroy_process_group", lambda: setattr(self, "gone", self.gone + 1))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(self, "device", device))
        self.others = [f"GPU-{rank}" for rank in range(9)]
        # the second process's own is GPU-1
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=self.others[1])
        )
        monkeypatch.setattr(dist, "all_gather_object", self._gather)

    def _gather(self, values, own):
        values[:] = self.others[: len(values)]
        assert own == values[1]


def test_processes_stop_together_when_a_signal_told_one_of_them(monkeypatch):
    def work(w):
        told = [w.any(False), w.any(w.rank == 1)]
        monkeypatch.setattr(world.stopping, "requested", lambda: w.rank == 2)
        with pytest.raises(Stopped):
            World(w.rank, w.size).stop_if_told()
        return told

    assert on_ranks(3, work) == [[False, True]] * 3
    assert ALONE.any(True) is True


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer. Look there", PosttrainError),
        ("shapes differ", RuntimeError),
    ],
)
def test_the_loss_of_another_process_is_told_from_other_errors(monkeypatch, error, kind):
    def fails(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(dist, "all_reduce", fails)
    with pytest.raises(kind) as raised:
        World(1, 2).sum(torch.ones(1))
    lost = "process 1 of 2 lost another one, whose error is the reason: "
    assert str(raised.value) == (error if kind is RuntimeError else lost + error.partition(". ")[0])


@pytest.mark.parametrize(("kind", "here", "gpus"), [("cpu", "9", 0), ("cuda", "2", 2), ("cuda", None, 1)])
def test_several_processes_meet_as_the_environment_says(nowhere, kind, here, gpus):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        nowhere.setenv(name, value)
    if here:
        nowhere.setenv("LOCAL_WORLD_SIZE", here)
    group, device = Group(nowhere, gpus), torch.device(kind)
    with joined(device) as made:
        assert made == World(1, 2)
        assert group.gone == 0
    (((backend,), named),) = group.made
    assert backend == ("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl")
    # the launcher's limit comes first
    assert named["timeout"].total_seconds() == 30 * 60 + world.HEADSTART_SECONDS
    assert group.device == (device if kind == "cuda" else None)
    assert group.gone == 1


@pytest.mark.parametrize("gpus", [1, 4])  # Slurm may show each process its own GPU alone
def test_processes_that_share_a_gpu_are_refused(nowhere, gpus):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        nowhere.setenv(name, value)
    nowhere.setenv("LOCAL_WORLD_SIZE", "4")
    nowhere.setenv("LOCAL_RANK", "1")
    group = Group(nowhere, gpus)
    with joined(torch.device("cuda", 0)) as made:
        assert made == World(1, 4)
    assert group.device == torch.device("cuda", 0)
    group.others = ["GPU-0", "GPU-1", "GPU-2", "GPU-1"]
    with (
        pytest.raises(PosttrainError, match=r"processes 1 and 3 would share a GPU \(GPU-1\): start one"),
        joined(torch.device("cuda", 0)),
    ):
        pass
    assert group.gone == 2


def test_by_default_a_process_holds_all_on_its_device_and_no_copies():
    assert Share() == Share(fraction=1.0, on_host=False)
    shares = Shares()
    assert shares.weights == shares.gradients == shares.moments == Share(1.0, False)
    assert shares.copies == Share(0.0, False)
    assert (shares.gathers, shares.keeps_gradients, shares.buffer) == (False, False, 0)
