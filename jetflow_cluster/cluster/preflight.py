"""What can be looked at before Ray is started. What asks nothing of torch comes first, so that most refusals take a
fraction of a second. The processes of the cluster look at the same things, by the same functions, where they are."""

from __future__ import annotations

from dataclasses import replace

from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.placement import check_fits, replica_shape
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.models.hub import checkpoints
from jetflow_cluster.models.stored_files import read_json, read_shapes, weight_files
from jetflow_cluster.models.tokenizer import read_tokenizer
from jetflow_cluster.router.callers import TokenFile
from jetflow_cluster.router.ports import why_not_free
from jetflow_cluster.router.tls import ServerCertificate

LOOPBACK = "127.0.0.1"


def check_before_start(config: ClusterConfig, *, is_here: bool) -> None:
    """Refuses what could not be served.

    Args:
        config: of what is to be deployed.
        is_here: all of it will run on this machine. Otherwise only what every node must see alike is looked at: the
            model, which this machine need not have; ports, devices, memory, certificates and tokens are those of other
            machines.

    Raises:
        ValueError, OSError, RuntimeError: in one sentence that names field, value and limit, or file.
    """
    if not is_here:
        _check_draft_placement(config)
        return
    check_safety_files(config)
    check_files(config)
    check_plan(config)
    check_ports(config)


def check_safety_files(config: ClusterConfig) -> None:
    """Raises OSError or ValueError for tokens and certificates that a router could not use."""
    safety = config.safety_config()
    if safety.token_file is not None:
        TokenFile(safety.token_file, safety.limits)
    if safety.tls_cert_file is not None and safety.tls_key_file is not None:
        ServerCertificate(safety.tls_cert_file, safety.tls_key_file, safety.tls_client_ca_file)


def check_files(config: ClusterConfig) -> None:
    """Raises ValueError or FileNotFoundError for checkpoints whose files are missing, cut short or no such files."""
    _check_draft_placement(config)
    target, head = checkpoints(config.engine_config())
    for folder in (target, head):
        if folder is not None:
            read_json(folder / "config.json")
            read_shapes(weight_files(folder))
    read_tokenizer(target)


def check_plan(config: ClusterConfig) -> None:
    """Raises ValueError for models that do not fit each other, the number of shards, or the memory. Imports torch."""
    import torch

    from jetflow_cluster.engine.memory_plan import DoesNotFitError

    num_actors = config.tensor_parallel_size + config.num_draft_workers
    num_gpus, found = config.num_gpus_per_actor, torch.cuda.device_count()
    if num_gpus and num_gpus * num_actors * config.num_replicas > found:
        wanted = f"{config.num_replicas} replicas of {num_actors} actors"
        raise ValueError(f"num_gpus_per_actor = {num_gpus:g}: {wanted}; torch finds {found} CUDA devices here")
    # A Ray that is started here counts as many CPUs as are asked for.
    node = {"CPU": config.num_cpus_per_actor * num_actors, "GPU": float(found)}
    check_fits(replica_shape(config, cluster_has_gpus=found > 0).bundles, config.placement_strategy, [node])
    engine = config.engine_config()
    try:
        # Whether a head is computed in half of it is known only when kernels are compiled, which takes seconds once.
        _check_memory(config, replace(engine, draft_dtype="float32"))
    except DoesNotFitError:
        _check_memory(config, engine)


def _check_memory(config: ClusterConfig, engine: EngineConfig) -> None:
    from jetflow_cluster.engine.memory_plan import DoesNotFitError
    from jetflow_cluster.engine.planned_memory import plan_draft_worker, plan_memory
    from jetflow_cluster.parallel.tp_group import TpGroup

    plan = plan_memory(engine, TpGroup.imagined(config.tensor_parallel_size), with_head=config.num_draft_workers == 0)
    together = config.tensor_parallel_size * plan.fixed_bytes
    if config.num_draft_workers:
        together += config.num_draft_workers * plan_draft_worker(engine, plan.num_pages).fixed_bytes
    # Devices of a node hold one actor each; a CPU's memory holds all of them.
    if plan.device.type == "cpu" and config.num_replicas * together > plan.usable_bytes:
        num_actors = config.tensor_parallel_size + config.num_draft_workers
        raise DoesNotFitError(
            f"num_replicas = {config.num_replicas}: {num_actors} actors of each take {together} bytes before any page; "
            f"{plan.usable_bytes} may be taken on this machine",
            plan,
        )


def check_ports(config: ClusterConfig) -> None:
    """Raises RuntimeError for a port of the routers that is taken on this machine."""
    for name in ("grpc_port", "http_port", "gateway_port"):
        port = getattr(config, name)
        reason = why_not_free(config.host or LOOPBACK, port) if port is not None else None
        if reason is not None:
            raise RuntimeError(f"{name} = {port}: {reason}")


def _check_draft_placement(config: ClusterConfig) -> None:
    if config.num_draft_workers and config.model is not None and config.draft_head is None:
        raise ValueError(
            f"num_draft_workers = {config.num_draft_workers} with draft_head = None: there is no head to run"
        )
