"""Every row of `docs/failed-starts.md`: its command is run, and says what stands there, in time."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from jetflow_kernels.cpu import cpu_kernels
from support.faulty_files import write_faulty_files

ROOT = Path(__file__).parents[1]
#: Seconds that a row of each table may take on a machine without other work.
_LIMITS_S = (5.0, 45.0)
_PRELUDE = """
jetflow() { exec "$PYTHON" -m jetflow_cluster "$@"; }
kill-shards() { "$PYTHON" -m support.kill_shards "$1"; wait "$1"; }
stop-served() { until grep -q "serving at" served || ! kill -0 "$1"; do sleep 0.2; done; kill -TERM "$1"; wait "$1"; }
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Of a table."""

    what: str
    command: str
    message: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a command."""

    exit_code: int
    errors: str
    wall_s: float


def _rows(part: str) -> list[Row]:
    lines = re.findall(r"^\| (.+) \| `(.+)` \| `(.+)` \| (\d+) \|$", part, re.MULTILINE)
    return [Row(what=w, command=c, message=m, exit_code=int(code)) for w, c, m, code in lines]


_TABLES = (ROOT / "docs" / "failed-starts.md").read_text().split("## In the cluster")
BEFORE, WITHIN = (_rows(part) for part in _TABLES)


def test_the_tables_are_read_whole() -> None:
    for part, rows in zip(_TABLES, (BEFORE, WITHIN), strict=True):
        # But the titles and the line below them.
        assert len(re.findall(r"^\|", part, re.MULTILINE)) == len(rows) + 2
    assert len(BEFORE) >= 40


def _run(row: Row, folder: Path, environment: Mapping[str, str]) -> Outcome:
    began = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", _PRELUDE + row.command],
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        errors = process.communicate()[1] + "\nit did not end"
    return Outcome(exit_code=process.returncode, errors=errors, wall_s=time.monotonic() - began)


def _check(row: Row, outcome: Outcome, limit_s: float) -> None:
    pattern = ".*".join(re.escape(part) for part in row.message.split("…"))
    lines = outcome.errors.splitlines()
    assert any(re.fullmatch(pattern, line) for line in lines), outcome.errors[-3000:]
    assert outcome.exit_code == row.exit_code
    assert "Traceback" not in outcome.errors
    # Others may use the processors too.
    patience = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if outcome.wall_s > limit_s else 1.0
    assert outcome.wall_s <= limit_s * patience, f"{outcome.wall_s:.1f} s with a load of {os.getloadavg()[0]:.1f}"


@contextmanager
def _listening() -> Iterator[int]:
    """A port on which connections are made and nobody answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_target_dir: Path, tiny_head_dir: Path) -> Path:
    # A machine has compiled its kernels once.
    cpu_kernels()
    made = tmp_path_factory.mktemp("faulty")
    write_faulty_files(made, tiny_target_dir, tiny_head_dir)
    return made


@pytest.fixture(scope="module")
def environment(folder: Path) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        taken, silent = (stack.enter_context(_listening()) for _ in range(2))
        yield {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests")),
            "HF_HOME": str(folder / "hub"),
            "TAKEN": str(taken),
            "SILENT": str(silent),
            "FREE": str(_free_port()),
        }


@pytest.fixture(scope="module")
def outcomes(folder: Path, environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Of the chosen rows of the first table, two at a time."""
    chosen = {item.callspec.params["row"].what for item in request.session.items if "outcomes" in item.fixturenames}
    with ThreadPoolExecutor(2) as threads:
        yield {row.what: threads.submit(_run, row, folder, environment) for row in BEFORE if row.what in chosen}


@pytest.mark.parametrize("row", BEFORE, ids=[row.what for row in BEFORE])
def test_before_ray(row: Row, outcomes: dict[str, Future]) -> None:
    _check(row, outcomes[row.what].result(), _LIMITS_S[0])


@pytest.fixture(scope="module")
def ray_address(environment: dict[str, str]) -> Iterator[str]:
    from ray.cluster_utils import Cluster

    from jetflow_cluster.cluster.ray_options import RAY_ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (RAY_ENVIRONMENT | {"PYTHONPATH": environment["PYTHONPATH"]}).items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        try:
            yield cluster.address
        finally:
            cluster.shutdown()


@contextmanager
def _served(folder: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """The port of a `jetflow serve`."""
    settings = ["model=target", "draft_head=head", "grpc_port=0", "http_port=none"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jetflow_cluster", "serve", *settings],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert select.select([server.stdout], [], [], 120)[0], "nothing was served"
        yield int(server.stdout.readline().rpartition(":")[2])
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("row", WITHIN, ids=[row.what for row in WITHIN])
def test_in_the_cluster(row: Row, folder: Path, environment: dict[str, str], request: pytest.FixtureRequest) -> None:
    with ExitStack() as stack:
        given = environment | {"FREE": str(_free_port())}
        if "$RAY" in row.command:
            given["RAY"] = request.getfixturevalue("ray_address")
        if "$SERVED" in row.command:
            given["SERVED"] = str(stack.enter_context(_served(folder, environment)))
        _check(row, _run(row, folder, given), _LIMITS_S[1])


@pytest.mark.slow
def test_the_status_has_the_sentence(ray_address: str) -> None:
    """Also where nobody but Serve deploys."""
    import ray
    from ray import serve

    from jetflow_cluster.cluster.app import build_app
    from jetflow_cluster.cluster.failures import read_failure

    ray.init(address=ray_address, configure_logging=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        app = build_app({"model": "/nowhere", "grpc_port": _free_port(), "http_port": None})
        serve.run_many([serve.RunTarget(app, name="failing", route_prefix=None)], wait_for_applications_running=False)
        deadline, messages = time.monotonic() + 120, list[str]()
        while time.monotonic() < deadline and len(messages) < 2:
            found = serve.status().applications["failing"].deployments
            # Serve says other things in between, as that a start takes long.
            told = [found[name].message for name in ("EngineReplica", "Router")]
            messages = [message for message in told if read_failure(message) is not None]
            time.sleep(0.2)
        for message in messages:
            assert "Traceback" not in message
            assert 'File "' not in message
            failure = read_failure(message)
            assert failure is not None
            assert " on node " in str(failure)
            assert "model = '/nowhere': no such folder" in str(failure)
            assert Path(str(failure).rpartition("log: ")[2]).is_file()
        assert len(messages) == 2
    finally:
        serve.shutdown()
        ray.shutdown()
