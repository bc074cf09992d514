"""Which resources a replica needs, and whether a cluster can ever give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jetflow_cluster.cluster.config import ClusterConfig

Resources = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ReplicaShape:
    """The bundles of one replica's placement group: the target's shards first, then dedicated draft workers."""

    shards: tuple[Resources, ...]
    draft_workers: tuple[Resources, ...]

    @property
    def bundles(self) -> list[Resources]:
        """In the order of the group."""
        return [*self.shards, *self.draft_workers]


def replica_shape(config: ClusterConfig, *, cluster_has_gpus: bool) -> ReplicaShape:
    """One bundle per actor, alike for shards and draft workers."""
    num_gpus = config.num_gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if cluster_has_gpus else 0.0
    bundle: Resources = {"CPU": config.num_cpus_per_actor}
    if num_gpus:
        bundle["GPU"] = num_gpus
    return ReplicaShape(
        shards=tuple(dict(bundle) for _ in range(config.tensor_parallel_size)),
        draft_workers=tuple(dict(bundle) for _ in range(config.num_draft_workers)),
    )


def check_fits(bundles: Sequence[Resources], strategy: str, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses what could never be placed, even on an idle cluster.

    Args:
        bundles: of one placement group.
        strategy: of Ray's placement groups.
        nodes: all resources of each living node.

    Raises:
        ValueError: with what is needed and what there is.
    """
    if not nodes:
        raise ValueError("the cluster has no living node")
    if strategy == "STRICT_PACK":
        total = _sum(bundles)
        if not any(_holds(node, total) for node in nodes):
            raise ValueError(
                f"placement_strategy = STRICT_PACK: needs one node with {_words(total)}; the nodes have {_all(nodes)}"
            )
        return
    if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
        raise ValueError(
            f"placement_strategy = STRICT_SPREAD: {len(bundles)} actors need as many nodes; there are {len(nodes)}"
        )
    free = [dict(node) for node in nodes]
    for index, bundle in enumerate(sorted(bundles, key=lambda b: sorted(b.items()), reverse=True)):
        # First fit of the largest first; bundles are alike, so this finds a place where there is one.
        place = next((node for node in free if _holds(node, bundle)), None)
        if place is None:
            raise ValueError(
                f"{len(bundles)} actors of {_words(bundle)} each do not fit: place was found for {index}; "
                f"the nodes have {_all(nodes)}"
            )
        if strategy == "STRICT_SPREAD":
            free.remove(place)
            continue
        for name, amount in bundle.items():
            place[name] -= amount


def _holds(node: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in bundle.items())


def _sum(bundles: Sequence[Resources]) -> Resources:
    total: Resources = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def _all(nodes: Sequence[Mapping[str, float]]) -> str:
    return "; ".join(_words({k: v for k, v in node.items() if k in ("CPU", "GPU")}) or "nothing" for node in nodes)
