"""Commands in the documentation are real: each is parsed by the program it calls, and files that it names are there.

What needs a cluster or a network (ray, serve, kubectl, helm, docker) is checked that way only; what runs on this
machine is run by `test_training_as_the_page_says` and `tests/cluster/test_launch.py`.
"""

from __future__ import annotations

import json
import re
import shlex
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

ROOT = Path(__file__).parents[1]
PAGES = ("one-machine", "ray-cluster", "kubernetes", "tuning", "training")
_REST = {"kubectl": ("apply", "get", "port-forward"), "helm": ("repo", "install"), "docker": ("build",)}


def commands(page: str) -> list[list[str]]:
    """Of the ``sh`` blocks of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


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
        from jetflow_cluster.cluster.launch import RAY_ENVIRONMENT

        for setting in rest:
            name, value = setting.split("=")
            assert RAY_ENVIRONMENT.get(name) == value or name == "RAY_AUTH_MODE"
            assert f"{name}={value}" in dockerfile or name == "RAY_AUTH_MODE"
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
