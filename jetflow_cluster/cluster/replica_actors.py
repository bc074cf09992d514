"""The actors of one replica: made in one placement group, watched, and replaced where that is possible."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import Any

import ray
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.placement import Resources, check_fits, replica_shape
from jetflow_cluster.cluster.shard import DraftWorkerProcess, Loaded, Served, TargetShard

_log = logging.getLogger(__name__)

#: Seconds for a placement group that fits the cluster to become free.
_PLACEMENT_TIMEOUT_S = 300.0
#: Seconds between looks at the actors, and pause before a lost draft worker is made anew.
_LOOK_S, _PAUSE_S = 0.1, 0.5


class ShardActor(TargetShard):
    """`TargetShard` in a process of its own."""

    def __init__(self, config: ClusterConfig, rank: int, replica_id: str):
        super().__init__(config, rank, get_node_ip_address(), replica_id)

    def live(self) -> None:
        """Never returns, so that its end tells the owner of the actor's death."""
        threading.Event().wait()


class DraftActor(DraftWorkerProcess):
    """`DraftWorkerProcess` in a process of its own."""

    def live(self) -> None:
        """See `ShardActor.live`."""
        threading.Event().wait()


class ReplicaActors:
    """All actors of one replica.

    Raises:
        ValueError: the cluster can never hold them; with the numbers.
    """

    def __init__(self, config: ClusterConfig, replica_id: str):
        self._config, self._replica_id = config, replica_id
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._shape = replica_shape(config, cluster_has_gpus=any(n.get("GPU", 0) >= 1 for n in nodes))
        check_fits(self._shape.bundles, config.placement_strategy, nodes)
        self._secret = secrets.token_bytes(32)
        self._group: PlacementGroup | None = None
        self._shards: list[Any] = []
        self._workers: dict[int, Any] = {}
        self._lives: dict[Any, tuple[str, int]] = {}
        self._loaded: Loaded | None = None
        self._closed = threading.Event()
        #: Why the replica cannot go on; None while it can.
        self.lost: str | None = None

    def start(self) -> Served:
        """Places, loads and warms up; returns what rank 0 serves."""
        started = time.monotonic()
        self._group = placement_group(self._shape.bundles, strategy=self._config.placement_strategy)
        ray.get(self._group.ready(), timeout=_PLACEMENT_TIMEOUT_S)
        self._shards = [
            self._make(ShardActor, rank, self._shape.shards[rank], self._config, rank, self._replica_id)
            for rank in range(self._config.tensor_parallel_size)
        ]
        placed = time.monotonic()
        doors = ray.get(self._shards[0].open.remote(self._secret))
        self._loaded = ray.get([shard.start.remote(doors) for shard in self._shards])[0]
        for rank, shard in enumerate(self._shards):
            self._lives[shard.live.remote()] = ("shard", rank)
        for index in range(self._config.num_draft_workers):
            self._start_worker(index)
        served: Served = ray.get(self._shards[0].serve.remote())
        served.phases["place"] = placed - started
        threading.Thread(target=self._watch, name="replica-watch", daemon=True).start()
        _log.info("%s serves at %s after %s", self._replica_id, served.address, served.phases)
        return served

    def process_ids(self) -> dict[str, int]:
        """Of every actor, by its part."""
        names = [f"shard {rank}" for rank in range(len(self._shards))]
        names += [f"draft worker {index}" for index in self._workers]
        actors = [*self._shards, *self._workers.values()]
        return dict(zip(names, ray.get([a.process_id.remote() for a in actors]), strict=True))

    def drain(self) -> None:
        """Takes nothing new and lets running requests finish."""
        ray.get(self._shards[0].drain.remote())

    def close(self) -> None:
        """Ends all actors and gives their resources back."""
        self._closed.set()
        for actor in [*self._shards, *self._workers.values()]:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _make(self, kind: type, bundle: int, resources: Resources, *args: Any) -> Any:
        actor = ray.remote(kind).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )
        return actor.remote(*args)

    def _start_worker(self, index: int) -> None:
        assert self._loaded is not None
        assert self._loaded.links is not None
        bundle = len(self._shape.shards) + index
        name = f"{self._replica_id}/{index}"
        worker = self._make(DraftActor, bundle, self._shape.draft_workers[index], self._config, name)
        self._workers[index] = worker
        worker.start.remote(self._loaded.links, self._secret, self._loaded.num_pages)
        self._lives[worker.live.remote()] = ("draft worker", index)

    def _watch(self) -> None:
        """A lost shard is the replica's end; a lost draft worker is made anew."""
        while not self._closed.is_set():
            done, _ = ray.wait(list(self._lives), num_returns=1, timeout=_LOOK_S)
            for life in done:
                what, index = self._lives.pop(life)
                if self._closed.is_set():
                    return
                _log.warning("%s: %s %d is gone", self._replica_id, what, index)
                if what == "shard":
                    self.lost = f"shard {index} is gone"
                    return
                time.sleep(_PAUSE_S)
                self._start_worker(index)
