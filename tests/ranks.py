"""Ranks as threads of this process: real collectives between them, in milliseconds."""

import threading
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from posttrain.distributed.world import World


def on_ranks(size, work, seconds=60):
    """What ``work(world)`` returns on each of ``size`` ranks, in their order; raises what one of them raised."""
    results, errors, store = [None] * size, [], dist.HashStore()

    def one(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = work(World(rank, size))
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threaded.ProcessLocalGroup.reset()  # what an earlier error ended
    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        alive = [thread for thread in threads if thread.is_alive()]
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
    if errors:
        raise errors[0]
    assert not alive, "a rank waits for another one"
    return results
