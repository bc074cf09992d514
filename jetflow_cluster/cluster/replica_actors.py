"""The actors of one replica: made in one placement group, watched, and replaced where that is possible."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jetflow_cluster.cluster.actors import DraftActor, ShardActor
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.failures import LostError, StartError, failed_start, own_place
from jetflow_cluster.cluster.handshake import Loaded, Place, Served
from jetflow_cluster.cluster.placement import Resources, check_fits, replica_shape
from jetflow_cluster.engine.phases import Phases
from jetflow_kernels.machine import Arithmetic

_log = logging.getLogger(__name__)

#: Seconds for a placement group that fits the cluster to become free.
_PLACEMENT_TIMEOUT_S = 300.0
#: Seconds between looks at the actors where none of them ends, and between signs of life that are asked of each.
_LOOK_S, _PULSE_S = 0.5, 0.5
#: Seconds for an actor that has just started to answer.
_JOIN_TIMEOUT_S = 5.0
#: Seconds between looks at the phase of a start.
_PHASE_S = 0.25
#: Seconds for rank 0 to tell its load.
_SIGNALS_TIMEOUT_S = 5.0
#: Seconds in which other actors may fail too, and say more than that one is gone.
_CAUSE_S = 1.0
#: Pause before a lost draft worker is made anew, in seconds; doubled with each start that fails.
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.1, 30.0


@dataclass(kw_only=True)
class _Member:
    """An actor that runs."""

    name: str
    actor: Any
    #: Ends with the actor.
    life: Any
    pid: int
    #: The sign of life that was asked for last, and when.
    pulse: Any = None
    asked_at: float = 0.0


class ReplicaActors:
    """All actors of one replica.

    Args:
        config: of the cluster.
        replica_id: name of the replica.
        on_lost: called, in a thread, with the reason when a shard is gone: the replica cannot go on.

    Raises:
        ValueError: the cluster can never hold them; with the numbers.
    """

    def __init__(self, config: ClusterConfig, replica_id: str, *, on_lost: Callable[[str], None]):
        self._config, self._replica_id, self._on_lost = config, replica_id, on_lost
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._shape = replica_shape(config, cluster_has_gpus=any(n.get("GPU", 0) >= 1 for n in nodes))
        check_fits(self._shape.bundles, config.placement_strategy, nodes)
        self._secret = secrets.token_bytes(32)
        self._group: PlacementGroup | None = None
        self._shards: list[_Member] = []
        self._workers: dict[int, _Member] = {}
        #: Draft workers that load, when those that could not are tried again, and how often in a row one could not.
        self._loading: dict[int, tuple[Any, Any]] = {}
        self._retry_at: dict[int, float] = {}
        self._num_failures = 0
        self._loaded: Loaded | None = None
        self._closed = threading.Event()
        #: Of each actor of the first start by its name, and where it runs.
        self._made: dict[str, Any] = {}
        self._places: dict[str, Any] = {}

    @property
    def process_ids(self) -> dict[str, int]:
        """Of every actor that runs, by its name."""
        return {member.name: member.pid for member in [*self._shards, *list(self._workers.values())]}

    def start(self, on_phase: Callable[[str], None], agree: Callable[[Arithmetic], Arithmetic]) -> Served:
        """Places, loads and warms up; returns what rank 0 serves.

        Args:
            on_phase: called with each phase as it begins.
            agree: from how rank 0 would compute by itself to how all replicas of the deployment do.

        Raises:
            StartError: an actor could not start; names it with its node, the cause and its log.
        """
        phases = Phases()

        def begin(phase: str) -> None:
            phases.begin(phase)
            on_phase(phase)

        begin("placing")
        self._group = placement_group(self._shape.bundles, strategy=self._config.placement_strategy)
        self._wait_for_group(self._group)
        begin("processes")
        shards = self._make_shards(None)
        # Their processes start meanwhile.
        workers = {f"draft worker {index}": self._make_worker(index) for index in range(self._config.num_draft_workers)}
        self._note_made(shards | workers)
        shards = self._agreeing(shards, workers, agree, on_phase)
        first = shards["shard 0"]
        (doors,) = self._results({"shard 0": first.open.remote(self._secret)}, on_phase)
        phases.end()
        self._loaded = self._results({name: shard.start.remote(doors) for name, shard in shards.items()}, on_phase)[0]
        self._shards = [_join(name, shard) for name, shard in shards.items()]
        for index, worker in enumerate(workers.values()):
            self._load_worker(index, worker)
        self._results({f"draft worker {index}": begun for index, (_, begun) in self._loading.items()}, on_phase)
        for index, (worker, _) in list(self._loading.items()):
            self._take_in(index, worker)
        served: Served = self._results({"shard 0": first.serve.remote()}, on_phase)[0]
        served.phases.update({**phases.seconds, **served.phases})
        self._made, self._places = {}, {}
        threading.Thread(target=self._watch, name="replica-watch", daemon=True).start()
        _log.info("%s serves at %s after %s", self._replica_id, served.address, served.phases)
        return served

    def signals(self) -> dict[str, float]:
        """See `TargetShard.signals`."""
        found: dict[str, float] = ray.get(self._shards[0].actor.signals.remote(), timeout=_SIGNALS_TIMEOUT_S)
        return found

    def trace(self, seconds: float) -> list[dict[str, Any]]:
        """What every actor did in the last seconds, as events of the Chrome trace format."""
        members = [*self._shards, *list(self._workers.values())]
        found = ray.get([member.actor.trace.remote(seconds) for member in members])
        names = [
            {"name": "process_name", "ph": "M", "pid": m.pid, "args": {"name": f"{self._replica_id} {m.name}"}}
            for m in members
        ]
        return [*names, *(event for events in found for event in events)]

    def drain(self) -> None:
        """Takes nothing new and lets running requests finish."""
        ray.get(self._shards[0].actor.drain.remote())

    def close(self) -> None:
        """Ends all actors and gives their resources back."""
        self._closed.set()
        actors = [member.actor for member in [*self._shards, *self._workers.values()]]
        for actor in {*actors, *self._made.values()}:
            ray.kill(actor)
        if self._group is not None:
            # Ends processes that are stopped, too.
            remove_placement_group(self._group)

    def _wait_for_group(self, group: PlacementGroup) -> None:
        try:
            ray.get(group.ready(), timeout=_PLACEMENT_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            bundles = self._shape.bundles
            wanted = f"{self._replica_id}: no room for {len(bundles)} actors of {bundles[0]}"
            waited = f"came free in the cluster within {_PLACEMENT_TIMEOUT_S:.0f} s"
            raise LostError(f"{wanted} {waited}; log: {own_place().log}") from None

    def _results(self, calls: Mapping[str, Any], on_phase: Callable[[str], None]) -> list[Any]:
        """What these actors answer, each to one call; meanwhile the phases of shard 0 are reported.

        Raises:
            StartError: the first that failed; rather one that says why than one that is gone, perhaps because of it.
        """
        names = {answer: name for name, answer in calls.items()}
        waiting, failures = list(names), list[StartError]()
        deadline, shown, asked = math.inf, "", self._made["shard 0"].phase.remote()
        while waiting and time.monotonic() < deadline:
            ended, waiting = ray.wait(waiting, timeout=_PHASE_S)
            for answer in ended:
                try:
                    ray.get(answer)
                except ray.exceptions.RayError as error:
                    name = f"{names[answer]} of replica {self._replica_id}"
                    failures.append(failed_start(name, self._place_of(names[answer]), error))
                    deadline = min(deadline, time.monotonic() + _CAUSE_S)
            if not failures and ray.wait([asked], timeout=0)[0]:
                phase, asked = _phase(asked), self._made["shard 0"].phase.remote()
                if phase and phase != shown:
                    shown = phase
                    on_phase(phase)
        if failures:
            raise next((each for each in failures if not isinstance(each, LostError)), failures[0])
        return list(ray.get(list(names)))

    def _place_of(self, name: str) -> Place:
        """Where an actor of the first start runs, or ran: by its own account, or by Ray's where it gave none."""
        try:
            found: Place = ray.get(self._places[name], timeout=_JOIN_TIMEOUT_S)
        except ray.exceptions.RayError:
            bundles = placement_group_table(self._group)["bundles_to_node_id"]
            node_id = bundles.get(list(self._made).index(name))
            nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            return Place(node=nodes.get(node_id, "unknown"), pid=0, log=str(Path(own_place().log).parent))
        return found

    def _make_shards(self, agreed: Arithmetic | None) -> dict[str, Any]:
        return {
            f"shard {rank}": self._make(ShardActor, rank, resources, self._config, rank, self._replica_id, agreed)
            for rank, resources in enumerate(self._shape.shards)
        }

    def _note_made(self, actors: dict[str, Any]) -> None:
        self._made = actors
        self._places = {name: actor.place.remote() for name, actor in actors.items()}

    def _agreeing(
        self,
        shards: dict[str, Any],
        workers: dict[str, Any],
        agree: Callable[[Arithmetic], Arithmetic],
        on_phase: Callable[[str], None],
    ) -> dict[str, Any]:
        """Shards that compute as all replicas of the deployment do: these, or others in their place.

        Raises:
            StartError: a shard's node cannot.
        """

        def asked() -> dict[str, Arithmetic]:
            answers = self._results({name: shard.arithmetic.remote() for name, shard in shards.items()}, on_phase)
            return dict(zip(shards, answers, strict=True))

        own = asked()
        agreed = agree(own["shard 0"])
        if all(each == agreed for each in own.values()):
            return shards
        _log.info("%s: shards start again, to compute in %s", self._replica_id, agreed)
        for shard in shards.values():
            ray.kill(shard)
        shards = self._make_shards(agreed)
        self._note_made(shards | workers)
        first = f"the deployment's first replica computes in {agreed}, and streams must be able to go on here"
        try:
            found = asked()
        except StartError as error:
            raise StartError(f"{error}; {first}") from None
        for name, other in found.items():
            if other != agreed:
                where = f"{name} of replica {self._replica_id} on node {self._place_of(name).node}"
                raise StartError(f"{where}: computes in {other}; {first}")
        return shards

    def _make(self, kind: type, bundle: int, resources: Resources, *args: Any) -> Any:
        actor = ray.remote(kind).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )
        return actor.remote(*args)

    def _make_worker(self, index: int) -> Any:
        bundle = len(self._shape.shards) + index
        name = f"{self._replica_id}/{index}"
        return self._make(DraftActor, bundle, self._shape.draft_workers[index], self._config, name)

    def _load_worker(self, index: int, worker: Any) -> None:
        assert self._loaded is not None
        assert self._loaded.links is not None
        self._loading[index] = (worker, worker.start.remote(self._loaded.links, self._secret, self._loaded.num_pages))

    def _take_in(self, index: int, worker: Any) -> None:
        del self._loading[index]
        self._workers[index] = _join(f"draft worker {index}", worker)

    def _watch(self) -> None:
        """A lost shard is the replica's end; a lost draft worker is made anew."""
        while not self._closed.is_set():
            members = [*self._shards, *self._workers.values()]
            ends = [member.life for member in members] + [begun for _, begun in self._loading.values()]
            # Returns at once when one of them is gone, or has loaded.
            ray.wait(ends, timeout=_LOOK_S)
            if self._closed.is_set():
                return
            for member in self._shards:
                if (reason := self._why_lost(member)) is not None:
                    self._on_lost(f"{member.name} {reason}")
                    return
            for index, worker in list(self._workers.items()):
                if (reason := self._why_lost(worker)) is not None:
                    _log.warning("%s: %s %s and is made anew", self._replica_id, worker.name, reason)
                    ray.kill(worker.actor)
                    del self._workers[index]
                    self._load_worker(index, self._make_worker(index))
            for index, (worker, begun) in list(self._loading.items()):
                if ray.wait([begun], timeout=0)[0]:
                    self._note_begun(index, worker, begun)
            for index in [i for i, moment in self._retry_at.items() if moment <= time.monotonic()]:
                del self._retry_at[index]
                self._load_worker(index, self._make_worker(index))

    def _why_lost(self, member: _Member) -> str | None:
        """None while the member lives; a stopped process counts as dead."""
        if ray.wait([member.life], timeout=0)[0]:
            return "is gone"
        now = time.monotonic()
        if member.pulse is not None and ray.wait([member.pulse], timeout=0)[0]:
            member.pulse = None
        if member.pulse is None and now - member.asked_at >= _PULSE_S:
            member.pulse, member.asked_at = member.actor.process_id.remote(), now
        # Ray's calls queue behind others, so more patience is due than with the plan channel.
        limit_s = 2 * self._config.silence_s
        if member.pulse is not None and now - member.asked_at > limit_s:
            return f"has shown no sign of life for {limit_s:g} s"
        return None

    def _note_begun(self, index: int, worker: Any, begun: Any) -> None:
        try:
            ray.get(begun)
            self._take_in(index, worker)
            self._num_failures = 0
            return
        except ray.exceptions.RayError as error:
            self._num_failures += 1
            pause_s = min(_MIN_PAUSE_S * 2.0**self._num_failures, _MAX_PAUSE_S)
            what = f"{self._replica_id}: draft worker {index} could not start; again in {pause_s:.1f} s"
            _log.warning("%s: %s", what, " ".join(str(error).split())[-500:])
        self._loading.pop(index, None)
        self._retry_at[index] = time.monotonic() + pause_s
        ray.kill(worker)


def _join(name: str, actor: Any) -> _Member:
    pid = ray.get(actor.process_id.remote(), timeout=_JOIN_TIMEOUT_S)
    return _Member(name=name, actor=actor, life=actor.live.remote(), pid=pid)


def _phase(asked: Any) -> str:
    """The answer to a question for the phase; empty where the shard is gone."""
    try:
        return str(ray.get(asked))
    except ray.exceptions.RayError:
        return ""
