"""The configuration that ships, and ``jetflow serve`` as a user runs it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jetflow_cluster.cli import app
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.router.ports import claim
from support.ports import free_port
from support.small_models import write_head, write_target

ROOT = Path(__file__).parents[2]


def test_two_starts_at_once_do_not_take_one_port() -> None:
    port = free_port()
    first = claim(port)
    assert first is not None and claim(port) is None
    first.close()
    again = claim(port)
    assert again is not None
    again.close()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert claim(listener.getsockname()[1]) is None


def test_the_serve_configuration_that_ships_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from jetflow_cluster.cluster.app import build_app

    found = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text()))
    (application,) = found.applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    assert ClusterConfig.from_mapping(application.args) == ClusterConfig()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["tensor_parallel_sise=2"], "did you mean 'tensor_parallel_size'"),
        (["grpc_port=70000"], "grpc_port = 70000"),
        (["model"], "must be key=value"),
    ],
)
def test_serve_refuses_what_it_does_not_know(settings: list[str], text: str) -> None:
    result = CliRunner().invoke(app, ["serve", *settings])
    assert result.exit_code != 0
    assert text in result.output


@pytest.mark.parametrize("text", ["", "- a list", "applications: []"])
def test_a_file_without_an_application_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["serve", "--config", str(path)])
    assert result.exit_code != 0
    assert "applications is missing or empty" in result.output


def test_a_file_with_what_only_serve_applies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: [{args: {}, deployments: [{name: EngineReplica, num_replicas: 3}]}]")
    result = CliRunner().invoke(app, ["serve", "--config", str(path)])
    assert result.exit_code != 0
    assert "deployments is for" in result.output


@pytest.mark.slow
def test_serve_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target, head = tmp_path / "target", tmp_path / "head"
    for folder in (target, head):
        folder.mkdir()
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    settings = {"model": target, "draft_head": head, "dtype": "float64", "num_pages": 128}
    settings |= {"grpc_port": 0, "http_port": 0}
    settings |= {"tensor_parallel_size": 2, "num_threads_per_actor": 1, "drain_timeout_s": 30}
    command = [sys.executable, "-m", "jetflow_cluster"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    server = subprocess.Popen(
        [*command, "serve", *(f"{k}={v}" for k, v in settings.items())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        assert server.stdout is not None
        assert select.select([server.stdout], [], [], 120)[0], "nothing was served"
        address = server.stdout.readline().split()[-1]
        asked = ["generate", "alpha beta", "--max-tokens", "12", "--ignore-eos", "--json"]
        there = subprocess.run([*command, *asked, "--server", address], capture_output=True, text=True, env=env)
        model = ["--model", str(target), "--draft-head", str(head), "--dtype", "float64"]
        here = subprocess.run([*command, *asked, *model], capture_output=True, text=True, env=env)
        assert there.returncode == here.returncode == 0, there.stderr + here.stderr
        assert json.loads(there.stdout)["token_ids"] == json.loads(here.stdout)["token_ids"]
        children = _descendants(server.pid)
        assert len(children) > 4
        server.send_signal(signal.SIGINT)
        # Below the grace period behind which Serve would kill what does not end by itself.
        assert server.wait(20) == 0
        deadline = time.monotonic() + 30
        while left := [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists() and not _is_zombie(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        server.kill()
        server.communicate()


def _descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    found = [pid]
    for parent in found:
        found += [child for child, above in pairs if above == parent]
    return found[1:]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
