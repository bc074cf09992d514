"""Configuration of a served cluster: what `build_app`, ``serve.yaml`` and ``jetflow serve`` take."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.router.safety import SafetyConfig

DRAFT_PLACEMENTS = ("colocated", "dedicated")
LOG_LEVELS, LOG_FORMATS = ("debug", "info", "warning", "error"), ("json", "text")
PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
#: KV slots below which hardly any request could be served.
_LEAST_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Everything that decides how a model is served. Raises ValueError naming field, value and limit."""

    #: Target checkpoint: a directory that every node sees, or a Hugging Face id; None is the embedded default.
    model: str | None = None
    #: Draft head checkpoint; None takes the embedded one for the embedded target, else no speculation.
    draft_head: str | None = None
    #: Name under which the model is served; None is the checkpoint's folder or id.
    served_model_name: str | None = None
    #: Compute type of weights and KV cache; ``auto`` is the checkpoint's on a GPU, float32 on a CPU.
    dtype: str = "auto"
    #: Shards of the target in each replica.
    tensor_parallel_size: int = 1
    #: ``colocated``: the head is split over the target's shards. ``dedicated``: it runs in workers of its own.
    draft_placement: str = "colocated"
    #: Dedicated draft workers of each replica.
    num_draft_workers: int = 0
    #: Complete engines; where their number follows the load, the fewest.
    num_replicas: int = 1
    #: Most complete engines; above `num_replicas`, their number follows the load. None keeps it.
    max_replicas: int | None = None
    #: What one replica should bear: prompt and output tokens still to be computed, the share of its pages that requests
    #: use, and seconds to a first token. More replicas are started where it is more.
    target_outstanding_tokens: float = 65_536.0
    target_kv_cache_usage: float = 0.7
    target_time_to_first_token_s: float = 2.0
    #: Seconds over which load is averaged, and for which it must ask for more or fewer replicas.
    load_look_back_s: float = 10.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    #: Replicas and routers that a new deployment may start before old ones leave, in per cent of their number. Without
    #: room for them in the cluster, 0: then one after the other is replaced, and a single one leaves a gap.
    max_surge_percent: int = 100
    #: Routers; at most one runs on a node.
    num_routers: int = 1
    #: CPUs of a router, as Ray counts them; above 0 keeps routers from nodes that have none to give, as a head may.
    num_cpus_per_router: float = 0.0
    #: How Ray lays a replica's shards and workers out over nodes.
    placement_strategy: str = "PACK"
    #: GPUs of a shard or draft worker; None is 1 where the cluster has GPUs, else 0.
    num_gpus_per_actor: float | None = None
    #: CPUs of a shard or draft worker, as Ray counts them.
    num_cpus_per_actor: float = 1.0
    #: Threads of a shard or draft worker without a GPU; None shares the node's cores out.
    num_threads_per_actor: int | None = None
    #: Interface that the routers listen on; None is loopback.
    host: str | None = None
    #: PEM files of the routers' certificate chain and its key; None serves without TLS.
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    #: PEM file of the authorities whose clients' certificates are let in; None asks for none.
    tls_client_ca_file: str | None = None
    #: YAML file of the tokens that are let in, on every node; None lets anybody in.
    token_file: str | None = None
    #: What each token may use: calls and tokens per second, and calls at once; None is no limit.
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    max_concurrent_requests: int | None = None
    #: Listen beyond loopback even without TLS and tokens.
    allow_insecure: bool = False
    #: Port of the routers' gRPC server.
    grpc_port: int = 9000
    #: Port of the routers' OpenAI-compatible API over HTTP; 0 takes a free one, None serves none.
    http_port: int | None = 8000
    #: Port of the adapter for gateways that speak `vllm.grpc.engine` (extra ``gateway``); None serves none.
    gateway_port: int | None = None
    #: Tokens (prompt, and output still to come) that a replica may have before it and still be given more; further
    #: requests wait in the router, in the order in which they came.
    max_replica_tokens: int = 262_144
    #: Tokens of the requests that may wait in a router; more are refused with a hint when to come again.
    max_queued_tokens: int = 1_048_576
    #: KV slots per page.
    page_size: int = 16
    #: Pages of the KV cache; None is a plan from free memory and the largest possible batch.
    num_pages: int | None = None
    #: Most rows of one step.
    max_num_batched_tokens: int = 2048
    #: Most requests that run at once in a replica.
    max_num_requests: int = 64
    #: Longest prompt plus output; None is the model's own limit.
    max_model_len: int | None = None
    #: Reuse KV pages of equal prompt prefixes.
    enable_prefix_cache: bool = True
    #: Mix what a greedy request's own text suggests into its trees.
    context_lookup: bool = True
    #: On CUDA, replay steps without prompt chunks from CUDA graphs; their trees hold no lookups.
    cuda_graphs: bool = True
    #: Seconds without a sign of life after which a process of a replica counts as dead, a stopped one too.
    silence_s: float = 1.5
    #: Seconds for a Serve replica to answer a health check; one that fails three in a row is replaced.
    health_timeout_s: float = 1.5
    #: Seconds after which a step that does not end is taken for dead, and its process ends itself.
    step_timeout_s: float = 30.0
    #: Seconds for which a target waits for a dedicated draft worker's guess.
    draft_timeout_s: float = 1.5
    #: Seconds that running requests get to finish when a replica or router is taken down.
    drain_timeout_s: float = 30.0
    #: Least severe message in the logs of the cluster's processes; ``info`` has a line per request.
    log_level: str = "info"
    #: ``json``: a line of JSON per message, with the request's id where it is about one. ``text``: for people.
    log_format: str = "json"
    #: OTLP collector, such as ``http://collector:4317``, that spans of requests are sent to; None sends none.
    trace_endpoint: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "draft_placement": DRAFT_PLACEMENTS,
            "placement_strategy": PLACEMENT_STRATEGIES,
            "log_level": LOG_LEVELS,
            "log_format": LOG_FORMATS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("num_replicas", "num_routers", "max_replica_tokens", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.num_pages is not None and self.num_pages * self.page_size < _LEAST_SLOTS:
            limit = f"must have {_LEAST_SLOTS} slots at least, {-(-_LEAST_SLOTS // self.page_size)} pages"
            raise ValueError(f"num_pages = {self.num_pages}: {self.num_pages * self.page_size} slots; {limit}")
        self._check_scaling()
        self._check_ports()
        for name in (
            "silence_s",
            "health_timeout_s",
            "step_timeout_s",
            "draft_timeout_s",
            "drain_timeout_s",
            "num_cpus_per_actor",
            "target_outstanding_tokens",
            "target_kv_cache_usage",
            "target_time_to_first_token_s",
            "load_look_back_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.num_gpus_per_actor is not None and self.num_gpus_per_actor < 0:
            raise ValueError(f"num_gpus_per_actor = {self.num_gpus_per_actor}: must be at least 0")
        if self.num_cpus_per_router < 0:
            raise ValueError(f"num_cpus_per_router = {self.num_cpus_per_router}: must be at least 0")
        if (self.draft_placement == "dedicated") != (self.num_draft_workers > 0):
            raise ValueError(
                f"num_draft_workers = {self.num_draft_workers} with draft_placement = {self.draft_placement!r}: "
                "dedicated placement needs at least 1, colocated has none"
            )
        self.engine_config()
        if self.host is not None:
            self.safety_config().check_host(self.host)

    def safety_config(self) -> SafetyConfig:
        """Who may call the routers, and how much."""
        return SafetyConfig(**{field.name: getattr(self, field.name) for field in fields(SafetyConfig)})

    def _check_ports(self) -> None:
        limit = "must be in [0, 65535]; 0 takes a free one"
        for name, more in {
            "grpc_port": "",
            "http_port": ", None serves none",
            "gateway_port": ", None serves none",
        }.items():
            port = getattr(self, name)
            if not ((more and port is None) or 0 <= port < 65536):
                raise ValueError(f"{name} = {port}: {limit}{more}")
        taken: dict[int, str] = {}
        for name in ("grpc_port", "http_port", "gateway_port"):
            port = getattr(self, name)
            if port and (other := taken.setdefault(port, name)) != name:
                raise ValueError(f"{name} = {port}: is {other} too; each needs a port of its own")

    def _check_scaling(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            limit = f"must be at least num_replicas = {self.num_replicas}, or None"
            raise ValueError(f"max_replicas = {self.max_replicas}: {limit}")
        follows_load = (self.max_replicas or 0) > self.num_replicas
        if follows_load and self.max_replica_tokens <= self.target_outstanding_tokens:
            limit = f"must be above target_outstanding_tokens = {self.target_outstanding_tokens:g}"
            raise ValueError(
                f"max_replica_tokens = {self.max_replica_tokens}: {limit}, or no load asks for a replica more"
            )
        if not 0 <= self.max_surge_percent <= 100:
            raise ValueError(f"max_surge_percent = {self.max_surge_percent}: must be in [0, 100]")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> ClusterConfig:
        """From a parsed file or keyword arguments; strings are read as the field's type where they come from a
        command line.

        Raises:
            ValueError: unknown keys, each with the nearest known one, or a value that does not fit.
        """
        known = {f.name: f for f in fields(cls)}
        unknown = [_suggest(key, list(known)) for key in given if key not in known]
        if unknown:
            raise ValueError(f"unknown configuration: {'; '.join(unknown)}")
        return cls(**{key: _read(key, str(known[key].type), value) for key, value in given.items()})

    def engine_config(self) -> EngineConfig:
        """What each shard's engine is made from."""
        return EngineConfig(
            model=self.model,
            draft_head=self.draft_head,
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            page_size=self.page_size,
            num_pages=self.num_pages,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_requests=self.max_num_requests,
            max_model_len=self.max_model_len,
            enable_prefix_cache=self.enable_prefix_cache,
            context_lookup=self.context_lookup,
            cuda_graphs=self.cuda_graphs,
        )


def _suggest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _read(key: str, annotation: str, value: Any) -> Any:
    """A command line gives text; everything else must have the right type already."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and "None" in kinds):
        if "None" in kinds:
            return None
        raise ValueError(f"{key} = None: must be {annotation}")
    kind = kinds[0]
    try:
        if kind == "str":
            if isinstance(value, str):
                return value
        elif kind == "bool":
            texts = {"true": True, "false": False, "1": True, "0": False}
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in texts:
                return texts[value.lower()]
        elif kind == "int":
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                return int(value)
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"{key} = {value!r}: must be {annotation}")
