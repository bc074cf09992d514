"""One rank of a replica's target, and one dedicated draft worker: what their processes do. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import datetime
import gc
import logging
import math
import os
import secrets
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.handshake import Doors, Loaded, Served, die
from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.server import ReplicaServer
from jetflow_cluster.cluster.replica.stage_ring import StageRing
from jetflow_cluster.engine.draft_link import DraftWorker, LinkListener
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.loading import load_draft_fuser, load_draft_worker, load_follower
from jetflow_cluster.engine.phases import Phases
from jetflow_cluster.engine.remote_drafter import RemoteDrafter
from jetflow_cluster.layers.compute_threads import release_compute_threads
from jetflow_cluster.metrics import Metrics
from jetflow_cluster.models.registry import TargetModel
from jetflow_cluster.parallel.channel import FollowerChannel, LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.rpc.secret import with_secret
from jetflow_kernels.machine import machine

_log = logging.getLogger(__name__)

#: Seconds that ranks wait for each other while they start; loading may take long.
_START_TIMEOUT_S = 1800.0
#: Seconds between looks at what a shard depends on.
_LOOK_S = 0.1
#: Stages that a process remembers for traces.
_NUM_TRACE_SLOTS = 65_536
#: Longest that the data plane's thread may keep the interpreter from the step loop, which gives it up with every
#: operation of torch, in seconds. Python's own 5 ms are as long as a step.
_SWITCH_S = 0.001


class TargetShard:
    """Rank `rank` of a target. Rank 0 leads: it has the engine and serves the data plane.

    Args:
        config: of the cluster.
        rank: 0 to ``tensor_parallel_size - 1``.
        host: address of this node, one that the other ranks and the routers reach.
        replica_id: name of the replica.
        metrics: are told by rank 0.
    """

    def __init__(self, config: ClusterConfig, rank: int, host: str, replica_id: str, *, metrics: Metrics | None = None):
        self._metrics = metrics
        self._config, self._rank, self._host, self._replica_id = config, rank, host, replica_id
        self._size = config.tensor_parallel_size
        self._phases = Phases()
        self._store: Any = None
        self._channel: LeaderChannel | None = None
        self._frontend: EngineFrontend | None = None
        self._listener: LinkListener | None = None
        self._drafter: RemoteDrafter | None = None
        self._server: ReplicaServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: What a follower did; rank 0's step loop has its own.
        self._stages = StageRing(_NUM_TRACE_SLOTS)
        _use_threads(config)

    def open(self, secret: bytes) -> Doors:
        """Rank 0: opens what the other ranks come in by."""
        timeout = datetime.timedelta(seconds=_START_TIMEOUT_S)
        self._store = TCPStore(self._host, 0, self._size, is_master=True, wait_for_workers=False, timeout=timeout)
        self._channel = LeaderChannel(self._host, 0, secret)
        return Doors(store=(self._host, self._store.port), channel=self._channel.address, secret=secret)

    def start(self, doors: Doors) -> Loaded | None:
        """Loads this rank's part; all ranks at the same time. Followers take up their work, rank 0 goes on with
        `serve`."""
        tp = self._join(doors)
        if self._rank == 0:
            return self._lead(tp, doors)
        self._follow(tp, doors)
        return None

    @property
    def phase(self) -> str:
        """What the start is at."""
        return self._phases.current

    def process_id(self) -> int:
        """Of this shard."""
        return os.getpid()

    def signals(self) -> dict[str, float]:
        """Rank 0: what the number of replicas follows; see `cluster.autoscaling.Signals`."""
        assert self._server is not None
        load = self._server.step_loop.load()
        return {
            "outstanding_tokens": float(load.outstanding_tokens),
            "kv_cache_usage": load.stats.num_used_pages / load.stats.num_pages,
            "time_to_first_token_s": load.time_to_first_token_s,
        }

    def trace(self, seconds: float) -> list[dict[str, Any]]:
        """Stages of the last seconds as events of the Chrome trace format; see `StageRing.events`."""
        return self._server.step_loop.trace(seconds) if self._server is not None else self._stages.events(seconds)

    def drain(self) -> None:
        """Rank 0: takes nothing new and lets running requests finish."""
        if self._server is not None and self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._server.drain(), self._loop).result()

    def _join(self, doors: Doors) -> TpGroup:
        if self._size == 1:
            return TpGroup.single()
        self._phases.begin("rendezvous")
        timeout = datetime.timedelta(seconds=_START_TIMEOUT_S)
        store = self._store or TCPStore(*doors.store, self._size, is_master=False, timeout=timeout)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # Buffers of recorded collectives, registered with NCCL, do not go with allocations that grow in segments.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        dist.init_process_group(backend, store=store, rank=self._rank, world_size=self._size)
        return TpGroup.from_process_group()

    def _follow(self, tp: TpGroup, doors: Doors) -> None:
        channel = FollowerChannel(doors.channel, doors.secret)
        follower = load_follower(
            self._config.engine_config(), tp=tp, channel=channel, with_head=self._config.num_draft_workers == 0
        )
        follower.on_stage = self._stages.begin
        release_compute_threads()

        def run() -> None:
            try:
                follower.run()
            except BaseException as error:
                die(f"rank {self._rank} of {self._replica_id}: {type(error).__name__}: {error}")

        threading.Thread(target=run, name="follower", daemon=True).start()

    def _lead(self, tp: TpGroup, doors: Doors) -> Loaded:
        assert self._channel is not None
        if self._size > 1:
            self._channel.accept(self._size - 1)
            threading.Thread(target=self._watch_ranks, name="ranks", daemon=True).start()
        has_workers = self._config.num_draft_workers > 0
        self._frontend = EngineFrontend(
            self._config.engine_config(),
            tp=tp,
            channel=self._channel if self._size > 1 else None,
            drafter_factory=(lambda *args: self._make_drafter(doors.secret, *args)) if has_workers else None,
            tree_nodes=None,
            is_drafter_ready=not has_workers,
            on_phase=self._phases.begin,
        )
        self._phases.begin("draft workers" if has_workers else "data plane")
        links = self._listener.address if self._listener is not None else None
        return Loaded(links=links, num_pages=self._frontend.engine.pool.num_pages)

    def _make_drafter(self, secret: bytes, target: TargetModel, num_pages: int, page_size: int) -> RemoteDrafter:
        config = self._config
        self._listener = LinkListener(self._host, 0, secret, {"num_pages": num_pages, "page_size": page_size})
        fuser = load_draft_fuser(config.engine_config(), target)
        # While the trees' cost is measured, a slow guess is no reason to go on without the worker.
        self._drafter = RemoteDrafter(
            fuser, self._listener, page_size=page_size, device=target.device, deadline_s=_START_TIMEOUT_S
        )
        return self._drafter

    def serve(self) -> Served:
        """Rank 0, once the draft workers are on their way: warms up and opens the data plane.

        Raises:
            TimeoutError: a draft worker did not come in.
        """
        assert self._frontend is not None
        if self._drafter is not None:
            self._wait_for_workers(self._drafter)
            self._drafter.pages_in_use = self._frontend.engine.pages_with_draft_context
            self._frontend.warm_up()
            self._drafter.deadline_s = self._config.draft_timeout_s
        self._phases.begin("data plane")
        server_config = ReplicaServerConfig(
            replica_id=self._replica_id,
            host=self._host,
            secret=secrets.token_hex(16),
            model_name=self._config.served_model_name,
            num_draft_workers=self._config.num_draft_workers,
            drain_timeout_s=self._config.drain_timeout_s,
        )
        ready: Future[str] = Future()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run_server, args=(server_config, ready), name="data-plane", daemon=True).start()
        address = ready.result()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        # What is there now stays: the collector need not look at it again and hold a step up.
        gc.collect()
        gc.freeze()
        self._phases.end()
        return Served(address=address, phases=self._phases.seconds)

    def _wait_for_workers(self, drafter: RemoteDrafter) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while drafter.num_workers < self._config.num_draft_workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{drafter.num_workers} of {self._config.num_draft_workers} draft workers came in")
            time.sleep(0.02)
            drafter.admit()

    def _run_server(self, config: ReplicaServerConfig, ready: Future[str]) -> None:
        assert self._loop is not None
        assert self._frontend is not None
        asyncio.set_event_loop(self._loop)
        try:
            self._server = ReplicaServer(config, self._frontend, metrics=self._metrics)
            port = self._loop.run_until_complete(self._server.start())
            ready.set_result(with_secret(config.secret, f"{self._host}:{port}"))
        except BaseException as error:
            ready.set_exception(error)
            return
        self._loop.run_forever()

    def _watch_ranks(self) -> None:
        """Ends the process when a rank is gone: recorded collectives wait for it without limit, also at warm-up."""
        assert self._channel is not None
        while True:
            time.sleep(_LOOK_S)
            rank, silent_s = self._channel.silence()
            if silent_s == math.inf:
                die(f"{self._replica_id}: rank {rank} is gone")

    def _watch(self) -> None:
        """Ends the process when a rank is gone, a step does not end or the loop is lost: nobody else could."""
        assert self._server is not None
        assert self._channel is not None
        while True:
            time.sleep(_LOOK_S)
            rank, silent_s = self._channel.silence()
            if silent_s > self._config.silence_s:
                die(f"{self._replica_id}: rank {rank} has been silent for {silent_s:.1f} s")
            age = self._server.step_loop.step_age_s
            if age > self._config.step_timeout_s:
                die(f"{self._replica_id}: a step has taken {age:.1f} s; the limit is {self._config.step_timeout_s:g} s")
            failure = self._server.step_loop.failure
            if failure is not None:
                die(f"{self._replica_id}: the engine is lost: {type(failure).__name__}: {failure}")


class DraftWorkerProcess:
    """A dedicated draft worker of one replica."""

    def __init__(self, config: ClusterConfig, name: str):
        self._config, self._name = config, name
        self._stages = StageRing(_NUM_TRACE_SLOTS)
        _use_threads(config)

    def process_id(self) -> int:
        """Of this worker."""
        return os.getpid()

    def trace(self, seconds: float) -> list[dict[str, Any]]:
        """See `TargetShard.trace`."""
        return self._stages.events(seconds)

    def start(self, links: tuple[str, int], secret: bytes, num_pages: int) -> None:
        """Loads the head and offers itself to the target. Guesses until the target lets go, then ends the process, so
        that whoever started it starts another."""
        drafter = load_draft_worker(self._config.engine_config(), num_pages=num_pages)
        worker = DraftWorker(
            drafter,
            page_size=self._config.page_size,
            name=self._name,
            described={"num_pages": num_pages, "page_size": self._config.page_size},
        )
        worker.on_stage = self._stages.begin
        worker.connect(links, secret)
        release_compute_threads()

        def run() -> None:
            worker.run()
            die(f"draft worker {self._name}: the target let go")

        threading.Thread(target=run, name="draft-worker", daemon=True).start()


def _use_threads(config: ClusterConfig) -> None:
    sys.setswitchinterval(_SWITCH_S)
    if config.num_threads_per_actor is not None:
        torch.set_num_threads(config.num_threads_per_actor)
    elif not torch.cuda.is_available():
        num_actors = config.tensor_parallel_size + config.num_draft_workers
        torch.set_num_threads(max(1, machine().num_cores // num_actors))
