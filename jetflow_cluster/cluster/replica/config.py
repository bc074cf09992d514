"""Configuration of a replica's server."""

from __future__ import annotations

from dataclasses import dataclass, field

from jetflow_cluster.rpc.limits import MAX_ID_CHARS, MAX_MODEL_CHARS, MAX_RESPONSE_BYTES


@dataclass(frozen=True, kw_only=True)
class ReplicaServerConfig:
    """Everything that decides how a replica serves its routers. Raises ValueError naming field, value and limit."""

    #: Name of this replica among its peers.
    replica_id: str = "replica-0"
    #: Interface that the server listens on.
    host: str = "0.0.0.0"
    #: Port of the data plane; 0 takes a free one.
    port: int = 0
    #: What routers must prove to know, at least 16 characters; empty lets in whoever reaches the port.
    secret: str = field(default="", repr=False)
    #: Name under which the model is served; None takes that of the checkpoint.
    model_name: str | None = None
    #: Dedicated draft workers that the replica has when all are there.
    num_draft_workers: int = 0

    #: Seconds of silence after which a router gets a frame with the load; under load it is told as often.
    heartbeat_s: float = 0.25
    #: Seconds that one frame may wait for a router to take it; then its stream is ended.
    stall_timeout_s: float = 10.0
    #: Events that may wait for one router while it does not read; one more ends its stream.
    max_pending_events: int = 65_536
    #: Bytes of a frame's events, about; what is more goes into the next. One request's prompt log-probabilities must
    #: fit, as they cannot be divided.
    max_frame_bytes: int = 32 * 2**20
    #: Seconds between two tellings of metrics.
    metrics_interval_s: float = 0.5
    #: Seconds for a router to say who it is.
    hello_timeout_s: float = 10.0
    #: Longest grace that a router may ask for, in seconds.
    max_grace_s: float = 300.0

    #: Steps in a row that may fail, each ending its requests, before the replica counts as lost.
    max_failed_steps: int = 8
    #: Stages of steps that are kept for traces; a step has six.
    num_trace_slots: int = 65_536

    #: Seconds that running requests get when the replica drains; what is left then goes to other replicas.
    drain_timeout_s: float = 60.0
    #: Seconds that the end of a running step is waited for when the server drains or stops.
    max_step_s: float = 60.0
    #: Seconds for open calls to end when the server stops.
    stop_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        self._require_text("replica_id", MAX_ID_CHARS)
        if self.model_name is not None:
            self._require_text("model_name", MAX_MODEL_CHARS)
        self._require("host", bool(self.host), "must not be empty")
        self._require("port", 0 <= self.port <= 65_535, "must be in [0, 65535]")
        self._require("num_draft_workers", self.num_draft_workers >= 0, "must not be negative")
        for name in ("heartbeat_s", "stall_timeout_s", "metrics_interval_s", "hello_timeout_s", "max_step_s"):
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("max_grace_s", "drain_timeout_s", "stop_timeout_s"):
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("max_pending_events", "max_failed_steps", "num_trace_slots"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        # An event of a step with log-probabilities may exceed a frame's share by itself; the rest is room for it.
        limit = f"must be in [1024, {MAX_RESPONSE_BYTES // 2}]"
        self._require("max_frame_bytes", 1024 <= self.max_frame_bytes <= MAX_RESPONSE_BYTES // 2, limit)

    def _require_text(self, name: str, max_chars: int) -> None:
        value = getattr(self, name)
        fits = value.isascii() and value.isprintable() and 1 <= len(value) <= max_chars
        self._require(name, fits, f"must be 1 to {max_chars} printable ASCII characters")

    def _require(self, name: str, holds: bool, limit: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: {limit}")
