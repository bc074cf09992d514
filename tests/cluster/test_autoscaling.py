"""How many replicas load asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig

from jetflow_cluster.cluster.app import autoscaling_config
from jetflow_cluster.cluster.autoscaling import LoadPolicy, Signals, Targets, desired_replicas
from jetflow_cluster.cluster.config import ClusterConfig

TARGETS = Targets(outstanding_tokens=1000, kv_cache_usage=0.5, time_to_first_token_s=2.0)


def told(*values: tuple[float, float, float]) -> list[Signals]:
    names = ("outstanding_tokens", "kv_cache_usage", "time_to_first_token_s")
    return [Signals(**dict(zip(names, each, strict=True))) for each in values]


@pytest.mark.parametrize(
    ("current", "signals", "wanted"),
    [
        (1, [], 1),
        (3, [], 3),
        (1, [(0, 0, 0)], 1),
        (1, [(1000, 0.5, 2.0)], 1),
        (1, [(1001, 0, 0)], 2),
        (1, [(5500, 0, 0)], 6),
        (1, [(0, 0.9, 0)], 2),
        (2, [(900, 0.1, 2.5), (0, 0, 0)], 3),
        (2, [(900, 0, 0)], 2),
        (2, [(801, 0, 0), (0, 0, 0)], 2),
        (2, [(799, 0, 0), (0, 0, 0)], 1),
        (3, [(0, 0, 0)] * 3, 1),
        (3, [(0, 0, 9.0)] * 3, 4),
        (4, [(700, 0.2, 1.0)] * 4, 4),
        (5, [(400, 0.2, 1.0)] * 5, 3),
        # Two of three are on their way.
        (3, [(1900, 0.9, 9.0)], 3),
        (3, [(100, 0.1, 9.0)], 3),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join("/".join(map(str, v)) for v in value),
)
def test_desired(current: int, signals: list[tuple[float, float, float]], wanted: int) -> None:
    assert desired_replicas(current, told(*signals), TARGETS) == wanted


@given(
    current=st.integers(1, 16),
    loads=st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1), st.floats(0, 1.9)), min_size=1, max_size=16),
)
def test_what_is_asked_for_is_enough_and_is_kept(current: int, loads: list[tuple[float, float, float]]) -> None:
    signals = told(*loads)
    wanted = desired_replicas(current, signals, TARGETS)
    assert wanted >= 1
    tokens = sum(s.outstanding_tokens for s in signals)
    assert tokens <= wanted * TARGETS.outstanding_tokens * (1 + 1e-9)
    # Under the same load the number does not swing.
    assert desired_replicas(wanted, signals, TARGETS) == wanted


@pytest.mark.parametrize("name", ["outstanding_tokens", "kv_cache_usage", "time_to_first_token_s"])
def test_targets_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 0"):
        Targets(**({"outstanding_tokens": 1, "kv_cache_usage": 1, "time_to_first_token_s": 1} | {name: 0}))


def test_only_replicas_that_told_all_count() -> None:
    policy = LoadPolicy(outstanding_tokens=1000, kv_cache_usage=0.5, time_to_first_token_s=2.0)
    metrics: dict[str, Any] = {
        "outstanding_tokens": {"a": 2500, "b": 9000},
        "kv_cache_usage": {"a": 0.1},
        "time_to_first_token_s": {"a": 0.1, "b": 0.1},
    }
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=1)
    assert policy(context) == (3, {})
    assert policy(SimpleNamespace(aggregated_metrics=None, target_num_replicas=2)) == (2, {})


def test_serve_takes_the_configuration_and_its_policy() -> None:
    config = ClusterConfig(num_replicas=2, max_replicas=5, target_outstanding_tokens=100)
    made = autoscaling_config(config)
    assert made is not None
    found = AutoscalingConfig(**made)
    assert (found.min_replicas, found.initial_replicas, found.max_replicas) == (2, 2, 5)
    assert "LoadPolicy" in str(found.policy.policy_function)
    assert found.policy.policy_kwargs["outstanding_tokens"] == 100
    assert autoscaling_config(ClusterConfig(num_replicas=2)) is None
