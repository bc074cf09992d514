"""What a measurement of starts reads: the command's words, and processor time of processes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from jetflow_cluster.bench.processes import cpu_seconds
from jetflow_cluster.bench.start import read_phases


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(
            "started in 14.2 s: looking at the configuration 0.5 s, Ray 2.3 s, replicas and router 8.1 s; of these a "
            "replica 4.6 s (weights 0.5, draft workers 0.9, placing 0.1)",
            {
                "looking at the configuration": 0.5,
                "Ray": 2.3,
                "replicas and router": 8.1,
                "replica": 4.6,
                "weights": 0.5,
                "draft workers": 0.9,
                "placing": 0.1,
            },
            id="present",
        ),
        pytest.param(
            "  start: load 22.1 s, warm up 0.0 s, place 2.2 s",
            {"load": 22.1, "warm up": 0.0, "place": 2.2},
            id="before",
        ),
        pytest.param("replica abc: shard 0 123, shard 1 124", {}, id="other"),
    ],
)
def test_phases_are_read(line: str, expected: dict[str, float]) -> None:
    assert read_phases(["serving at 1", line]) == expected


def test_processor_time_is_that_of_all_descendants() -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        time.sleep(0.2)
        found = cpu_seconds(process.pid)
        process.stdin.close()
    assert set(found) <= {"command", "Ray"}
    assert 0.4 <= sum(found.values()) < 5.0
