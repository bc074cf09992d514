"""The demonstration fails where a process is lost that it did not end."""

from __future__ import annotations

from typing import Any

import pytest

from jetflow_cluster.bench import demo_served
from jetflow_cluster.bench.demo_served import Loss, UnplannedLossError

BEFORE = {
    "replicas": {"a": {"pids": {"shard 0": 1, "draft worker 0": 2}}, "b": {"pids": {"shard 0": 3}}},
    "routers": {"r": {"pids": {"router": 4}}},
}


def after(**changed: Any) -> dict[str, Any]:
    """The members later: some with other processes, or gone where None."""
    members = {kind: dict(found) for kind, found in BEFORE.items()}
    for name, pids in changed.items():
        kind = "routers" if name == "r" else "replicas"
        if pids is None:
            del members[kind][name]
        else:
            members[kind][name] = {"pids": pids}
    return members


@pytest.mark.parametrize(
    ("killed", "later", "expected"),
    [
        pytest.param("", after(), None, id="nothing-lost"),
        pytest.param("b", after(b=None, c={"shard 0": 9}), None, id="the-killed-one-replaced"),
        pytest.param("b", after(b=None, a=None), "replica a", id="another-replica"),
        pytest.param("b", after(b=None, a={"shard 0": 1, "draft worker 0": 7}), "replica a", id="a-draft-worker"),
        pytest.param("b", after(b=None, r={"router": 5}), "router r", id="the-router"),
        pytest.param("", after(b=None), "replica b", id="nobody-killed-it"),
    ],
)
def test_what_nobody_ended_is_noticed(
    killed: str, later: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_served.launch, "overview", lambda: later)
    if expected is None:
        demo_served._check_processes(BEFORE, Loss(replica_id=killed))
        return
    with pytest.raises(UnplannedLossError, match=f"a process of {expected} is gone"):
        demo_served._check_processes(BEFORE, Loss(replica_id=killed))
