"""The package as a newcomer installs it: from a wheel, called in another folder, on one core with 4 GB of memory."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.image import context_files
from support.ports import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROMPT = "def f(x):"
LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Installed:
    """A wheel, and a virtual environment in which it is all that is installed anew."""

    wheel: Path
    python: Path

    def jetflow(self, arguments: Sequence[str], prefix: Sequence[str] = ()) -> list[str]:
        return [*prefix, str(self.python.with_name("jetflow")), *arguments]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With spaces in its name; sockets in it need a short one."""
    with tempfile.TemporaryDirectory(prefix="jet flow ", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def installed(folder: Path) -> Installed:
    source, environment = folder / "source", folder / "environment"
    for path in context_files(ROOT):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    purelib = sysconfig.get_path("purelib", vars={"base": str(environment)}, scheme="posix_prefix")
    # Dependencies are those of the environment that runs the tests; its own paths come first.
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    return Installed(wheel=wheel, python=python)


@pytest.fixture(scope="module")
def variables(folder: Path) -> Iterator[dict[str, str]]:
    """Of a user with a home and nothing else."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    (folder / "home").mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        yield kept | {"HOME": str(folder / "home"), "RAY_TMPDIR": ray_folder}


@pytest.fixture
def limited() -> Iterator[list[str]]:
    """What precedes a command to run it on one core, with 4 GB where this machine lets us make control groups."""
    prefix = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(parent, f"jetflow-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(LIMIT_BYTES))
            yield ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(group / "cgroup.procs"), *prefix]
            return
        except OSError:
            continue
        finally:
            for pid in (group / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            group.rmdir()
    yield prefix


def test_the_wheel_has_all_files_of_the_package(installed: Installed) -> None:
    packed = set(zipfile.ZipFile(installed.wheel).namelist())
    sources = [str(path).removeprefix("kernels/") for path in context_files(ROOT)]
    wanted = {name for name in sources if name.startswith(("jetflow_cluster/", "jetflow_kernels/"))}
    assert wanted - packed == set() and {name for name in packed - wanted if ".dist-info/" not in name} == set()


def test_it_works_in_another_folder(
    installed: Installed, variables: dict[str, str], limited: list[str], tmp_path: Path
) -> None:
    def output_of(*arguments: str) -> str:
        command = installed.jetflow(arguments, limited)
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = "import jetflow_cluster, jetflow_kernels; print(jetflow_cluster.__file__, jetflow_kernels.__file__)"
    found = subprocess.run([installed.python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert found.stdout.count(str(installed.python.parents[1])) == 2, found.stdout + found.stderr
    alone = json.loads(output_of("generate", PROMPT, "--max-tokens", "16", "--json"))["text"]
    assert "identical" in output_of(
        "demo", "--part", "speed", "--num-prompts", "1", "--max-tokens", "16", "--output", "a demo"
    )
    assert list((tmp_path / "a demo").rglob("results.json"))
    ports = {"grpc_port": free_port(), "http_port": free_port()}
    command = installed.jetflow(["serve", *(f"{name}={port}" for name, port in ports.items())], limited)
    with (tmp_path / "errors").open("w") as errors:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert server.stdout is not None
            is_ready = select.select([server.stdout], [], [], 240)[0] and server.stdout.readline()
            assert is_ready, (tmp_path / "errors").read_text()
            address = f"localhost:{ports['grpc_port']}"
            over_grpc = output_of("generate", PROMPT, "--max-tokens", "16", "--json", "--server", address)
            body = json.dumps({"model": "default", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}).encode()
            request = urllib.request.Request(
                f"http://localhost:{ports['http_port']}/v1/completions", body, {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                over_http = json.load(answer)["choices"][0]["text"]
            assert json.loads(over_grpc)["text"] == over_http == alone != ""
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
