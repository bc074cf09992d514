"""Configuration of a router."""

from __future__ import annotations

from dataclasses import dataclass, field

from jetflow_cluster.router.safety import SafetyConfig

MAX_ID_CHARS = 48
#: Separates the parts of a request id.
ID_SEPARATOR = ":"


def check_id(name: str, value: str) -> None:
    """Raises ValueError unless the value can be a part of a request id."""
    fits = value.isascii() and value.isprintable() and 1 <= len(value) <= MAX_ID_CHARS
    if not fits or ID_SEPARATOR in value or " " in value:
        limit = f"1 to {MAX_ID_CHARS} printable ASCII characters without space and {ID_SEPARATOR!r}"
        raise ValueError(f"{name} = {value!r}: must be {limit}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Everything that decides how a router works. Raises ValueError naming field, value and limit."""

    #: Name of this router among its peers; part of the request ids that it gives.
    router_id: str = "router-0"
    #: Interface that the server listens on.
    host: str = "127.0.0.1"
    #: Port of the API; 0 takes a free one.
    port: int = 9000
    #: Interface of the port for the other routers, which have to know its secret.
    internal_host: str = "127.0.0.1"
    #: Who may call, and how much.
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    #: Port of the OpenAI-compatible API over HTTP; 0 takes a free one, None serves none.
    http_port: int | None = None
    #: Port of `vllm.grpc.engine.VllmEngine` (extra ``gateway``); 0 takes a free one, None serves none.
    gateway_port: int | None = None
    #: HTTP connections that may be open at once; further ones are refused.
    max_http_connections: int = 2_048
    #: Seconds that a client may take nothing of what is written for it; then its request ends.
    client_stall_s: float = 30.0
    #: Let another router of this node listen on the same ports, so that it can take them over without a gap.
    share_ports: bool = False
    #: The model's ``tokenizer.json``, or the directory that has it; None leaves the encoding of text to replicas.
    tokenizer: str | None = None

    #: Tokens (prompt, and output still to come) of the requests that wait in this router; more are refused.
    max_queued_tokens: int = 1_048_576
    #: Tokens that a replica may have before it and still be given more; what is beyond waits in the router.
    max_replica_tokens: int = 262_144
    #: Tokens per second that a replica is thought to serve until it was measured.
    prior_tokens_per_s: float = 1_000.0
    #: Seconds that a request waits while no replica is healthy.
    unavailable_after_s: float = 5.0

    #: Outstanding tokens by which a replica may exceed the least loaded one and still be preferred for its cache.
    load_bound_tokens: int = 8_192
    #: Tokens per page of the record of prefixes.
    prefix_page_size: int = 16
    #: Pages of one request that are recorded; what follows them does not count for the choice.
    max_prefix_pages: int = 1_024
    #: Pages that are recorded per replica, the latest used ones.
    max_index_pages: int = 65_536

    #: Seconds without a frame after which a replica counts as lost.
    silence_s: float = 1.5
    #: Seconds for a connection to a replica to be made and answered.
    connect_timeout_s: float = 5.0
    #: Pause before a lost replica is tried again, in seconds; doubled each time.
    min_probe_pause_s: float = 0.1
    #: Longest such pause, in seconds.
    max_probe_pause_s: float = 2.0
    #: Seconds without a frame to a replica after which an empty one is sent.
    ping_s: float = 0.5

    #: Seconds that a begun request waits for a replica to go on with.
    resume_timeout_s: float = 15.0
    #: Replicas that may fail on a request in a row without a further token before it fails.
    max_fruitless_attempts: int = 5
    #: Seconds that an aborted request waits for its replica's last word.
    abort_grace_s: float = 1.0

    #: Seconds after which a client's connection is closed, so that clients spread anew; None never.
    max_connection_age_s: float | None = None
    #: Seconds that running calls of such a connection get; None lets them end.
    max_connection_age_grace_s: float | None = None
    #: Seconds that running requests get when the router drains.
    drain_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_id("router_id", self.router_id)
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port = {self.port}: must be in [0, 65535]")
        for name in ("http_port", "gateway_port"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value <= 65_535, "must be in [0, 65535], or None")
        if not self.host:
            raise ValueError(f"host = {self.host!r}: must not be empty")
        self.safety.check_host(self.host)
        counts = "max_queued_tokens max_replica_tokens prefix_page_size max_prefix_pages max_index_pages"
        for name in (*counts.split(), "max_fruitless_attempts", "max_http_connections"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("load_bound_tokens", self.load_bound_tokens >= 0, "must not be negative")
        positive = "prior_tokens_per_s silence_s connect_timeout_s min_probe_pause_s max_probe_pause_s ping_s"
        for name in (*positive.split(), "client_stall_s"):
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("unavailable_after_s", "resume_timeout_s", "abort_grace_s", "drain_timeout_s"):
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("max_connection_age_s", "max_connection_age_grace_s"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "must be above 0, or None")
        limit = f"must not be below min_probe_pause_s = {self.min_probe_pause_s}"
        self._require("max_probe_pause_s", self.max_probe_pause_s >= self.min_probe_pause_s, limit)

    def _require(self, name: str, holds: bool, limit: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)}: {limit}")
