"""Which of the cluster's lines reach the terminal of `jetflow serve`."""

from __future__ import annotations

import io

import pytest

from jetflow_cluster.cluster.ray_lines import RayLines

OURS, MESSAGE = (
    "\x1b[36m(ShardActor pid=17)\x1b[0m ",
    '{"time": "2026-01-01 00:00:00,000", "level": "%s", "message": "said"}',
)


@pytest.mark.parametrize(
    ("line", "at_start", "later"),
    [
        pytest.param("started in 8 s", True, True, id="of-this-process"),
        pytest.param(f"{OURS}{MESSAGE % 'INFO'}", False, True, id="message"),
        pytest.param(f"{OURS}{MESSAGE % 'WARNING'}", True, True, id="warning"),
        pytest.param(f"{OURS}{MESSAGE % 'ERROR'}", False, True, id="error"),
        pytest.param(
            f"{OURS}2026-01-01 00:00:00,000 WARNING a shard jetflow_cluster.x: said", True, True, id="as-text"
        ),
        pytest.param(f"{OURS}Traceback (most recent call last):", False, False, id="stack-trace"),
        pytest.param(
            f"\x1b[36m(ServeReplica:jetflow:Router pid=1)\x1b[0m {MESSAGE % 'INFO'}", False, True, id="router"
        ),
        pytest.param("\x1b[36m(ServeController pid=1)\x1b[0m INFO said", False, False, id="controller"),
        pytest.param("\x1b[33m(raylet)\x1b[0m A worker died or was killed", False, False, id="raylet"),
        pytest.param(f"(ShardActor pid=1, ip=10.0.0.2) {MESSAGE % 'INFO'}", False, True, id="other-node-no-colour"),
    ],
)
@pytest.mark.parametrize("is_starting", [True, False], ids=["at-start", "later"])
def test_lines(line: str, at_start: bool, later: bool, is_starting: bool) -> None:
    stream = io.StringIO()
    lines = RayLines(stream)
    lines.is_starting = is_starting
    print(line, file=lines)
    print("the last", file=lines)
    passes = at_start if is_starting else later
    assert stream.getvalue() == (f"{line}\n" if passes else "") + "the last\n"
