"""A replica's actors as Ray makes them. What makes or asks them loads no torch: their own processes do."""

from __future__ import annotations

import threading
from typing import Any

from ray.util import get_node_ip_address

from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.failures import own_place, starting
from jetflow_cluster.cluster.handshake import Doors, Loaded, Place, Served
from jetflow_cluster.cluster.observability import observe_process
from jetflow_cluster.cluster.ray_metrics import RayMetrics
from jetflow_kernels.machine import Arithmetic


class ShardActor:
    """A `TargetShard` in a process of its own.

    Args:
        config: as `TargetShard` has it.
        rank: likewise.
        replica_id: likewise.
        agreed: what it is to compute in; None is what its processor does by itself.
    """

    def __init__(self, config: ClusterConfig, rank: int, replica_id: str, agreed: Arithmetic | None):
        observe_process(config, {"replica_id": replica_id, "process": f"shard {rank}"})
        self._name = f"shard {rank} of replica {replica_id}"
        self._refusal: ValueError | None = None
        try:
            # Before torch is loaded, which reads its environment once.
            if agreed is not None:
                agreed.apply()
        except ValueError as error:
            self._refusal = error
        from jetflow_cluster.cluster.shard import TargetShard

        metrics = RayMetrics({"replica_id": replica_id}) if rank == 0 else None
        self._shard = TargetShard(config, rank, get_node_ip_address(), replica_id, metrics=metrics)

    def open(self, secret: bytes) -> Doors:
        """See `TargetShard.open`."""
        with starting(self._name):
            return self._shard.open(secret)

    def start(self, doors: Doors) -> Loaded | None:
        """See `TargetShard.start`."""
        with starting(self._name):
            return self._shard.start(doors)

    def serve(self) -> Served:
        """See `TargetShard.serve`."""
        with starting(self._name):
            return self._shard.serve()

    def arithmetic(self) -> Arithmetic:
        """See `TargetShard.arithmetic`.

        Raises:
            StartError: it cannot compute in what was agreed.
        """
        with starting(self._name):
            if self._refusal is not None:
                raise self._refusal
            return self._shard.arithmetic()

    def place(self) -> Place:
        """See `own_place`."""
        return own_place()

    def phase(self) -> str:
        """See `TargetShard.phase`."""
        return self._shard.phase

    def process_id(self) -> int:
        """See `TargetShard.process_id`."""
        return self._shard.process_id()

    def signals(self) -> dict[str, float]:
        """See `TargetShard.signals`."""
        return self._shard.signals()

    def trace(self, seconds: float) -> list[dict[str, Any]]:
        """See `TargetShard.trace`."""
        return self._shard.trace(seconds)

    def drain(self) -> None:
        """See `TargetShard.drain`."""
        self._shard.drain()

    def live(self) -> None:
        """Never returns, so that its end reports the actor's death to the owner."""
        threading.Event().wait()


class DraftActor:
    """A `DraftWorkerProcess` in a process of its own."""

    def __init__(self, config: ClusterConfig, name: str):
        observe_process(config, {"replica_id": name.partition("/")[0], "process": f"draft worker {name[-1]}"})
        self._name = f"draft worker {name[-1]} of replica {name.partition('/')[0]}"
        from jetflow_cluster.cluster.shard import DraftWorkerProcess

        self._worker = DraftWorkerProcess(config, name)

    def start(self, links: tuple[str, int], secret: bytes, num_pages: int) -> None:
        """See `DraftWorkerProcess.start`."""
        with starting(self._name):
            self._worker.start(links, secret, num_pages)

    def place(self) -> Place:
        """See `own_place`."""
        return own_place()

    def process_id(self) -> int:
        """See `DraftWorkerProcess.process_id`."""
        return self._worker.process_id()

    def trace(self, seconds: float) -> list[dict[str, Any]]:
        """See `DraftWorkerProcess.trace`."""
        return self._worker.trace(seconds)

    def live(self) -> None:
        """See `ShardActor.live`."""
        threading.Event().wait()
