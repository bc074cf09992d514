"""Configuration of a cluster is read whole, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest

from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.placement import check_fits, replica_shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modell": "x"}, r"'modell' \(did you mean 'model'\?\)"),
        (
            {"tensor_paralel_size": 2, "zzz": 1},
            r"'tensor_paralel_size' \(did you mean 'tensor_parallel_size'\?\); 'zzz'",
        ),
        ({"num_replicas": "two"}, "num_replicas = 'two': must be int"),
        ({"num_replicas": 0}, "num_replicas = 0: must be at least 1"),
        ({"num_replicas": None}, "num_replicas = None"),
        ({"num_replicas": True}, "num_replicas = True: must be int"),
        ({"enable_prefix_cache": "maybe"}, "enable_prefix_cache = 'maybe': must be bool"),
        ({"draft_placement": "elsewhere"}, "draft_placement = 'elsewhere': must be one of colocated, dedicated"),
        ({"draft_placement": "dedicated"}, "num_draft_workers = 0 with draft_placement = 'dedicated'"),
        ({"num_draft_workers": 1}, "colocated has none"),
        ({"placement_strategy": "pack"}, "placement_strategy = 'pack': must be one of PACK"),
        ({"grpc_port": 70000}, "grpc_port = 70000"),
        ({"http_port": -1}, "http_port = -1: .*None serves none"),
        ({"gateway_port": 65536}, "gateway_port = 65536"),
        ({"max_queued_tokens": 0}, "max_queued_tokens = 0: must be at least 1"),
        (
            {"max_replicas": 2, "max_replica_tokens": 9, "target_outstanding_tokens": 9},
            "max_replica_tokens = 9: must be",
        ),
        ({"step_timeout_s": 0}, "step_timeout_s = 0"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"page_size": 0}, "page_size = 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig.from_mapping(given)


def test_a_command_lines_texts_are_read_as_what_the_fields_are() -> None:
    given = {"num_replicas": "2", "step_timeout_s": "1.5", "enable_prefix_cache": "false", "model": "none"}
    config = ClusterConfig.from_mapping(given)
    assert (config.num_replicas, config.step_timeout_s, config.enable_prefix_cache) == (2, 1.5, False)
    assert config.model is None


@pytest.mark.parametrize(
    ("has_gpus", "given", "bundle", "num"),
    [
        (False, {}, {"CPU": 1.0}, (1, 0)),
        (True, {"tensor_parallel_size": 2}, {"CPU": 1.0, "GPU": 1.0}, (2, 0)),
        (True, {"num_gpus_per_actor": 0.5, "num_cpus_per_actor": 2}, {"CPU": 2.0, "GPU": 0.5}, (1, 0)),
        (False, {"draft_placement": "dedicated", "num_draft_workers": 2}, {"CPU": 1.0}, (1, 2)),
    ],
    ids=["cpu", "gpu-tp-2", "half-a-gpu", "dedicated"],
)
def test_a_replicas_bundles(
    has_gpus: bool, given: dict[str, Any], bundle: dict[str, float], num: tuple[int, int]
) -> None:
    shape = replica_shape(ClusterConfig.from_mapping(given), cluster_has_gpus=has_gpus)
    assert (len(shape.shards), len(shape.draft_workers)) == num
    assert shape.bundles == [bundle] * sum(num)


@pytest.mark.parametrize(
    ("strategy", "num", "nodes", "message"),
    [
        ("PACK", 4, [{"CPU": 4}], None),
        ("PACK", 4, [{"CPU": 2}, {"CPU": 2}], None),
        ("SPREAD", 3, [{"CPU": 2}, {"CPU": 2}], None),
        ("PACK", 5, [{"CPU": 2}, {"CPU": 2}], "5 actors of 1 CPU each do not fit: place was found for 4"),
        (
            "STRICT_PACK",
            3,
            [{"CPU": 2}, {"CPU": 2}],
            "one node with 3 CPU; the nodes have 2 CPU; 2 CPU",
        ),
        ("STRICT_PACK", 2, [{"CPU": 1}, {"CPU": 2}], None),
        ("STRICT_SPREAD", 2, [{"CPU": 8}], "need as many nodes; there are 1"),
        ("STRICT_SPREAD", 2, [{"CPU": 8}, {"CPU": 0.5}], "place was found for 1"),
        ("PACK", 1, [], "no living node"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    strategy: str, num: int, nodes: list[dict[str, float]], message: str | None
) -> None:
    bundles = [{"CPU": 1.0} for _ in range(num)]
    if message is None:
        check_fits(bundles, strategy, nodes)
        return
    with pytest.raises(ValueError, match=message):
        check_fits(bundles, strategy, nodes)
