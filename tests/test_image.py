"""`deploy/Dockerfile`, built step by step in a fresh root, starts Ray and serves requests."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
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
def container() -> Iterator[Container]:
    """The image, built and running."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="jetflow-image-"))
    try:
        image = Image(root=folder / "root", context=ROOT)
        image.build(ROOT / "deploy" / "Dockerfile")
        running = image.start(folder / "log")
        try:
            yield running
        finally:
            running.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait(what: Callable[[], bool], limit_s: float, container: Container) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert container.outer.poll() is None and time.monotonic() < deadline, container.log.read_text()
        time.sleep(0.5)


@pytest.mark.slow
def test_the_image_serves_as_its_user(container: Container) -> None:
    def answers(*command: str) -> bool:
        return container.execute(*command).returncode == 0

    def output_of(*command: str) -> str:
        done = container.execute(*command)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}{container.log.read_text()}"
        return done.stdout

    wait(lambda: answers("ray", "health-check"), 120, container)
    assert output_of("id", "--user", "--name").strip() == "ray" != "root"
    output_of("serve", "deploy", "deploy/serve.yaml")
    # What the probe of deploy/kuberay asks.
    wait(lambda: answers("wget", "-qO-", "http://localhost:8000/health"), 240, container)
    over_grpc = json.loads(output_of("jetflow", "generate", PROMPT, "--server", "localhost:9000", "--json"))
    asked = json.dumps({"model": "default", "prompt": PROMPT, "max_tokens": 128, "temperature": 0})
    header = "--header=content-type: application/json"
    over_http = json.loads(
        output_of("wget", "-qO-", header, f"--post-data={asked}", "http://localhost:8000/v1/completions")
    )
    alone = json.loads(output_of("jetflow", "generate", PROMPT, "--json", "--speculation", "off"))
    assert over_grpc["text"] == over_http["choices"][0]["text"] == alone["text"] != ""
    # KubeRay's own probes, by the programs that it expects in an image.
    raylet, head = "localhost:52365/api/local_raylet_healthz", "localhost:8265/api/gcs_healthz"
    for address in (raylet, head):
        output_of("bash", "-c", f"wget --tries 1 -T 10 -q -O- http://{address} | grep success")
    assert "ray_" in output_of("wget", "-qO-", "http://localhost:8080/metrics")
    # A compiler is there, and a home to keep what it made.
    assert output_of("sh", "-c", "ls ~/.cache/jetflow/kernels/*.so")
    # No second copy of the package hides the one that is installed.
    assert output_of("python", "-c", "import jetflow_cluster; print(jetflow_cluster.__file__)").startswith(
        "/usr/local/"
    )
