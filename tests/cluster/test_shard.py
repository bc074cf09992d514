"""What one rank's process does when another is lost before the replica serves."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch.multiprocessing as mp

from jetflow_cluster.cluster import shard
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.shard import TargetShard


def _shard(rank: int) -> TargetShard:
    config = ClusterConfig(tensor_parallel_size=2, num_threads_per_actor=1)
    return TargetShard(config, rank, "127.0.0.1", "replica")


def _lead(doors: Any, has_begun: Any) -> None:
    def warm_up_without_end(*args: object, **options: object) -> None:
        has_begun.set()
        time.sleep(600)

    shard.EngineFrontend = warm_up_without_end
    leader = _shard(0)
    opened = leader.open(b"0123456789abcdef")
    doors.put(opened)
    leader.start(opened)


def _follow(doors: Any) -> None:
    _shard(1).start(doors.get())


def test_a_rank_lost_at_warm_up_ends_the_first_one() -> None:
    """A recorded collective would wait for it without end."""
    context = mp.get_context("spawn")
    doors, has_begun = context.Queue(), context.Event()
    leader = context.Process(target=_lead, args=(doors, has_begun), daemon=True)
    follower = context.Process(target=_follow, args=(doors,), daemon=True)
    leader.start()
    follower.start()
    assert has_begun.wait(120)
    time.sleep(0.5)
    assert leader.is_alive()
    os.kill(follower.pid or 0, signal.SIGKILL)
    leader.join(10)
    assert leader.exitcode == 1
