"""Commands in the documentation are real: each is parsed by the program it calls, and files that it names are there.

What needs a cluster or a network (ray, serve, kubectl, helm, docker, other models) is checked that way only; what runs
on this machine is run by the slow tests below.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from jetflow_cluster.bench.prompts import DEFAULT_CHECKPOINT
from jetflow_cluster.cli import app
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.metrics import CATALOGUE
from support.ports import free_port

ROOT = Path(__file__).parents[1]
PAGES = ("one-machine", "ray-cluster", "kubernetes", "tuning", "training")
SERVED_PAGES = ("docs/one-machine.md", "docs/api.md", "README.md")
_REST = {"kubectl": ("apply", "get", "port-forward"), "helm": ("repo", "install"), "docker": ("build",)}


def blocks(path: str, language: str) -> list[str]:
    """Of a page, in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Of the ``sh`` blocks of a page."""
    lines = [line for block in blocks(f"docs/{page}.md", "sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


ALL = [(page, words) for page in PAGES for words in commands(page)]


def parse(command: Any, words: list[str]) -> Any:
    """Parses by click, without running; returns the context of the command that would run."""
    context = command.make_context(command.name, list(words), resilient_parsing=False)
    if isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        rest = [*getattr(context, "protected_args", getattr(context, "_protected_args", [])), *context.args]
        _, found, rest = command.resolve_command(context, rest)
        return parse(found, rest)
    return context


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}-{' '.join(words)[:50]}" for page, words in ALL])
def test_a_command_is_one_that_its_program_takes(page: str, words: list[str]) -> None:
    program, *rest = words
    if program == "jetflow":
        context = parse(typer.main.get_command(app), rest)
        if rest[0] == "serve":
            pairs = dict(pair.split("=") for pair in context.params["settings"] or [])
            ClusterConfig.from_mapping(pairs)
    elif program == "ray":
        from ray.scripts.scripts import cli

        parse(cli, rest)
    elif program == "serve":
        from ray.serve.scripts import cli as serve_cli

        parse(serve_cli, rest)
    elif program == "export":
        dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
        from jetflow_cluster.cluster.ray_options import RAY_ENVIRONMENT

        for setting in rest:
            name, value = setting.split("=")
            assert RAY_ENVIRONMENT.get(name) == value or name == "RAY_AUTH_MODE"
            assert f"{name}={value}" in dockerfile or name == "RAY_AUTH_MODE"
        if page == "ray-cluster":
            told = {word.split("=")[0] for _, found in ALL for word in found if found[0] == "export" and "=" in word}
            assert told >= set(RAY_ENVIRONMENT)
    else:
        assert rest[0] in _REST[program]
    for word in rest:
        if word.startswith("deploy/"):
            assert (ROOT / word).exists()
            if program in ("serve", "jetflow"):
                (application,) = yaml.safe_load((ROOT / word).read_text())["applications"]
                ClusterConfig.from_mapping(application["args"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((ROOT / "docs" / link).exists() for link in links), links


def test_metrics_that_the_tables_name_exist() -> None:
    names = {metric.name.removeprefix("jetflow_") for metric in CATALOGUE}
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|[^|]+\|$", (ROOT / "docs" / "tuning.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) >= 6 and not set(named) - names


@pytest.mark.slow
def test_training_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.small_models import write_target

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "of").mkdir(parents=True)
    write_target(tmp_path / "folder" / "of" / "target")
    prompts = json.loads((DEFAULT_CHECKPOINT / "held_out_prompts.json").read_text())
    texts = [prompt["text"] for prompt in prompts]
    (tmp_path / "my_code.txt").write_text("\n\n".join(texts[:60]))
    (tmp_path / "held_out.json").write_text(json.dumps(texts[60:70]))
    small = {
        "distill": ["--minutes", "0.2", "--num-regenerated", "4", "--num-windows", "16", "--new-tokens", "16"],
        "evaluate-head": ["--num-prompts", "2", "--num-tokens", "16", "--prompt-tokens", "8"],
        "generate": ["--max-tokens", "8"],
    }
    for _, name, *rest in commands("training"):
        if name == "serve":
            continue
        result = CliRunner().invoke(app, [name, *rest, *small[name]], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "head" / "draft_head" / "model.safetensors").exists()


@contextmanager
def served(folder: Path, ports: dict[str, int]) -> Iterator[dict[str, str]]:
    """The embedded model, served by the command that the pages begin with; the environment to call it in."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "jetflow").write_text(f'#!/bin/sh\nexec {sys.executable} -m jetflow_cluster "$@"\n')
    (bin_folder / "jetflow").chmod(0o755)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    path = os.pathsep.join((str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    # A folder of its own, so that no other Ray of this machine is found in its place; sockets need a short name.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        env = os.environ | {"PYTHONPATH": paths, "PATH": path, "RAY_TMPDIR": ray_folder}
        settings = [f"{name}={port}" for name, port in ports.items()]
        command = ["jetflow", "serve", *settings, "num_pages=512", "num_threads_per_actor=1"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        try:
            assert server.stdout is not None
            assert select.select([server.stdout], [], [], 120)[0] and server.stdout.readline(), "nothing was served"
            yield env
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)


@pytest.mark.slow
def test_calls_as_the_pages_say(tmp_path: Path) -> None:
    ports = {"grpc_port": free_port(), "http_port": free_port()}
    programs = [block for page in SERVED_PAGES for block in blocks(page, "python")]
    lines = [line for page in SERVED_PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    lines = [
        line for line in lines if line.startswith(("curl", "jetflow generate", "jetflow timeline", "jetflow doctor"))
    ]
    assert len(programs) >= 4 and len(lines) >= 5
    with served(tmp_path, ports) as env:
        for text in [*lines, *programs]:
            here = text.replace("localhost:9000", f"localhost:{ports['grpc_port']}")
            here = here.replace("localhost:8000", f"localhost:{ports['http_port']}")
            command = ["sh", "-c", here] if text in lines else [sys.executable, "-c", here]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
            assert done.stdout.strip() or done.stderr.strip(), text
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_measuring_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {
        "offline": ["--num-prompts", "1", "--max-tokens", "8", "--batch-sizes", "1", "--budgets", "8"],
        "serve": shlex.split("--concurrency 1 --modes off,auto --num-rounds 2 --prompt-lengths 32 --output-lengths 16"),
        "evaluate-head": ["--num-prompts", "2", "--num-tokens", "16"],
        "trace": ["--max-tokens", "8"],
    }
    for _, *rest in commands("tuning"):
        name = rest[1] if rest[0] == "bench" else rest[0]
        result = CliRunner().invoke(app, [*rest, *small[name]], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "trees.html").exists()
