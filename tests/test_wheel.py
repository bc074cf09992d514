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
SHORT = ("--max-tokens", "16", "--json")
LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Installed:
    """A wheel, and a virtual environment in which it is all that is newly installed."""

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


@dataclass(frozen=True)
class User:
    """Who calls the installed command, from where, and within which limits."""

    installed: Installed
    variables: dict[str, str]
    cwd: Path
    prefix: Sequence[str] = ()

    def output_of(self, *arguments: str) -> str:
        command = self.installed.jetflow(arguments, self.prefix)
        done = subprocess.run(command, cwd=self.cwd, env=self.variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def served(self) -> tuple[str, str]:
        """What a server answers over gRPC and over HTTP, which then ends."""
        ports = {"grpc_port": free_port(), "http_port": free_port()}
        command = self.installed.jetflow(["serve", *(f"{n}={port}" for n, port in ports.items())], self.prefix)
        log = self.cwd / "errors"
        with log.open("w") as errors:
            server = subprocess.Popen(
                command, cwd=self.cwd, env=self.variables, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            assert server.stdout is not None
            assert select.select([server.stdout], [], [], 240)[0] and server.stdout.readline(), log.read_text()
            over_grpc = self.output_of("generate", PROMPT, *SHORT, "--server", f"localhost:{ports['grpc_port']}")
            body = json.dumps({"model": "default", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}).encode()
            url = f"http://localhost:{ports['http_port']}/v1/completions"
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(over_grpc)["text"], json.load(answer)["choices"][0]["text"]
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0


def test_it_works_in_another_folder(
    installed: Installed, variables: dict[str, str], limited: list[str], tmp_path: Path
) -> None:
    code = "import jetflow_cluster, jetflow_kernels; print(jetflow_cluster.__file__, jetflow_kernels.__file__)"
    found = subprocess.run([installed.python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert found.stdout.count(str(installed.python.parents[1])) == 2, found.stdout + found.stderr
    user = User(installed, variables, tmp_path, limited)
    alone = json.loads(user.output_of("generate", PROMPT, *SHORT))["text"]
    demo = ("--part", "speed", "--num-prompts", "1", "--max-tokens", "16", "--output", "a demo")
    assert "identical" in user.output_of("demo", *demo)
    assert list((tmp_path / "a demo").rglob("results.json"))
    assert user.served() == (alone, alone) and alone != ""


def test_who_cannot_write_at_home_can_serve(installed: Installed, variables: dict[str, str], tmp_path: Path) -> None:
    # Neither root nor anybody else makes folders here.
    served = User(installed, variables | {"HOME": "/sys/kernel"}, tmp_path).served()
    assert len(set(served)) == 1 and "" not in served
