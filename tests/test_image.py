"""`deploy/Dockerfile`, built step by step in a fresh root, starts Ray and serves requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.image import Container, Image, Step, context_files, read_steps

ROOT = Path(__file__).parents[1]
PROMPT = "def f(x):"
NEEDED = ("debootstrap", "unshare", "nsenter", "chroot")


def test_steps_are_read_as_docker_reads_them() -> None:
    text = "# a comment\nFROM a\n\nRUN one \\\n  # within\n    && two\nENV A=1 \\\n    B=2\n"
    assert read_steps(text) == [Step("FROM", "a"), Step("RUN", "one      && two"), Step("ENV", "A=1      B=2")]
    with pytest.raises(ValueError, match="HEALTHCHECK: must be one of"):
        read_steps("FROM a\nHEALTHCHECK CMD true\n")


@pytest.mark.parametrize(
    "rules, sent",
    [
        pytest.param("", ["a.txt", "b/c.py", "b/d/e.py", "b/d/f.txt"], id="none"),
        pytest.param("b", ["a.txt"], id="folder"),
        pytest.param("*.txt", ["b/c.py", "b/d/e.py", "b/d/f.txt"], id="top-level"),
        pytest.param("**/*.txt", ["b/c.py", "b/d/e.py"], id="all-levels"),
        pytest.param("*\n!b/d", ["b/d/e.py", "b/d/f.txt"], id="brought-back"),
        pytest.param("*\n!b\nb/d\n!b/d/e.py", ["b/c.py", "b/d/e.py"], id="last-rule"),
    ],
)
def test_what_is_ignored_is_not_sent(tmp_path: Path, rules: str, sent: list[str]) -> None:
    for name in ("a.txt", "b/c.py", "b/d/e.py", "b/d/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text(f"{rules}\n.dockerignore\n")
    assert [str(path) for path in context_files(tmp_path)] == sent


def test_the_context_has_all_that_the_package_is_made_of() -> None:
    sent = {str(path) for path in context_files(ROOT)}
    assert {"pyproject.toml", "README.md", "LICENSE", "deploy/serve.yaml"} <= sent
    assert {"kernels/jetflow_kernels/cpu/rows.c", "jetflow_cluster/checkpoints/default/target/config.json"} <= sent
    assert not [name for name in sent if "__pycache__" in name or name.startswith((".", "tests", "out", "build"))]


@pytest.mark.parametrize(
    "steps, message",
    [
        pytest.param("COPY no/such ./", "COPY no/such: nothing of that name", id="copy"),
        pytest.param("USER nobody-here", "USER nobody-here: /etc/passwd of the image", id="user"),
        pytest.param("FROM fedora:42", "FROM fedora:42: must be python:VERSION-slim-RELEASE", id="from"),
    ],
)
def test_a_step_that_cannot_be_done_is_named(tmp_path: Path, steps: str, message: str) -> None:
    (tmp_path / "Dockerfile").write_text(steps)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    with pytest.raises((OSError, ValueError), match=message):
        Image(root=tmp_path, context=ROOT).build(tmp_path / "Dockerfile")


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Built."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="jetflow-image-"))
    folder.chmod(0o755)
    try:
        built = Image(root=folder / "root", context=ROOT)
        built.build(ROOT / "deploy" / "Dockerfile")
        yield built
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(image: Image, log: Path, *command: str) -> Iterator[Container]:
    container = image.start(log, *command)
    try:
        yield container
    finally:
        container.kill()


def wait(what: Callable[[], bool], limit_s: float, container: Container) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert container.outer.poll() is None and time.monotonic() < deadline, container.log.read_text()
        time.sleep(0.5)


def output_of(container: Container, *command: str, user: str | None = None) -> str:
    done = container.execute(*command, user=user)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}{container.log.read_text()}"
    return done.stdout


@pytest.mark.slow
def test_the_image_serves_as_its_user(image: Image, tmp_path: Path) -> None:
    with running(image, tmp_path / "log") as container:

        def answers(*command: str) -> bool:
            return container.execute(*command).returncode == 0

        wait(lambda: answers("ray", "health-check"), 120, container)
        assert output_of(container, "id", "--user", "--name").strip() == "ray"
        output_of(container, "serve", "deploy", "deploy/serve.yaml")
        # What the probe of deploy/kuberay asks.
        wait(lambda: answers("wget", "-qO-", "http://localhost:8000/health"), 240, container)
        served = output_of(container, "jetflow", "generate", PROMPT, "--server", "localhost:9000", "--json")
        asked = json.dumps({"model": "default", "prompt": PROMPT, "max_tokens": 128, "temperature": 0})
        post = ("wget", "-qO-", "--header=content-type: application/json", f"--post-data={asked}")
        over_http = json.loads(output_of(container, *post, "http://localhost:8000/v1/completions"))
        alone = json.loads(output_of(container, "jetflow", "generate", PROMPT, "--json", "--speculation", "off"))
        assert json.loads(served)["text"] == over_http["choices"][0]["text"] == alone["text"] != ""
        # KubeRay's own probes, by the programs that it expects in an image.
        for address in ("localhost:52365/api/local_raylet_healthz", "localhost:8265/api/gcs_healthz"):
            output_of(container, "bash", "-c", f"wget --tries 1 -T 10 -q -O- http://{address} | grep success")
        assert "ray_" in output_of(container, "wget", "-qO-", "http://localhost:8080/metrics")
        # A compiler is there, and a home to keep what it made; results go to the folder that commands start in.
        assert output_of(container, "sh", "-c", "ls ~/.cache/jetflow/kernels/*.so && touch result")
        # No second copy of the package hides the one that is installed.
        where = output_of(container, "python", "-c", "import jetflow_cluster; print(jetflow_cluster.__file__)")
        assert where.startswith("/usr/local/")


@pytest.mark.slow
def test_two_users_serve_at_the_same_time(image: Image, tmp_path: Path) -> None:
    ports = {"anne": 9100, "bert": 9200}
    with running(image, tmp_path / "log", "sleep", "infinity") as container:
        for name in ports:
            output_of(container, "/usr/sbin/useradd", "--create-home", name, user="root")
        # As somebody else's `ray start` leaves it.
        shared = image.root / "tmp" / "ray"
        shared.mkdir(exist_ok=True)
        shared.chmod(0o777)
        (shared / "ray_current_cluster").write_text("127.0.0.1:6399")
        logs = {name: tmp_path / name for name in ports}
        for name, port in ports.items():
            settings = (f"grpc_port={port}", f"http_port={port + 1}", "num_pages=512", "num_threads_per_actor=1")
            with logs[name].open("wb") as log:
                call = container.inside(["jetflow", "serve", *settings], name)
                subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

        def both_serve() -> bool:
            texts = {name: log.read_text() for name, log in logs.items()}
            assert not [text for text in texts.values() if "error:" in text or "Traceback" in text], texts
            return all("serving at" in text for text in texts.values())

        wait(both_serve, 240, container)
        texts = set()
        for name, port in ports.items():
            served = output_of(
                container, "jetflow", "generate", PROMPT, "--server", f"localhost:{port}", "--json", user=name
            )
            alone = output_of(container, "jetflow", "generate", PROMPT, "--json", "--speculation", "off", user=name)
            texts |= {json.loads(served)["text"], json.loads(alone)["text"]}
        assert len(texts) == 1 and "" not in texts
        # Each has its own place for metrics.
        assert len({re.findall(r"metrics: (\S+)", log.read_text())[0] for log in logs.values()}) == len(ports)
