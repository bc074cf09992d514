"""What is shown of a start, and where Ray's words go."""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from jetflow_cluster.bench.start import read_phases
from jetflow_cluster.cluster import launch
from jetflow_cluster.cluster.directory import Directory
from jetflow_cluster.cluster.progress import StartProgress
from jetflow_cluster.cluster.ray_output import ray_output_in


def test_phases_of_replicas_are_shown_as_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([ConnectionError("nobody there yet"), {"a": "weights"}, {"a": "weights"}, {"a": "measuring", "b": "x"}])

    def starting() -> dict[str, str]:
        found = next(told, {})
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(launch, "starting", starting)
    monkeypatch.setattr("jetflow_cluster.cluster.progress._LOOK_S", 0.01)
    out = io.StringIO()
    progress = StartProgress(Console(file=out, width=200))
    with progress:
        progress.begin("Ray")
    with progress.following_replicas("replicas"):
        time.sleep(0.5)
    lines = [line.split(" s  ")[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "Ray",
        "replicas",
        "replicas: replica a: weights",
        "replicas: replica a: measuring, replica b: x",
    ]
    summary = progress.summary({"a": {"phases": {"weights": 0.1}}, "b": {"phases": {"weights": 0.2, "measuring": 3.0}}})
    found = read_phases([summary])
    assert found["replica"] == 3.2 and found["measuring"] == 3.0 and found["replicas"] >= 0.5
    assert set(found) == {"Ray", "replicas", "replica", "weights", "measuring"}


def test_the_directory_knows_what_starts_until_it_serves() -> None:
    async def told() -> list[dict[str, str]]:
        directory = Directory()
        await directory.note_start("a", "weights")
        await directory.note_start("b", "placing")
        await directory.note_start("a", "measuring")
        before = await directory.starting()
        await directory.report("replica", "a", "host:1")
        return [before, await directory.starting()]

    assert asyncio.run(told()) == [{"a": "measuring", "b": "placing"}, {"b": "placing"}]


def test_what_others_print_goes_to_the_file_and_what_is_shown_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, shown = tmp_path / "folder" / "ray.log", sys.stdout
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    with ray_output_in(path):
        print("printed by a thread")
        print("an error", file=sys.stderr)
        for logger in loggers:
            logger.warning("%s warned", logger.name)
        print("shown", file=shown)
    text = path.read_text()
    for expected in ("printed by a thread", "an error", "WARNING ray: ray warned", "ray.serve: ray.serve warned"):
        assert expected in text
    assert "shown" not in text
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("shown\n", "")
    assert [(logger.handlers[:], logger.propagate) for logger in loggers] == before


@pytest.mark.parametrize(
    "module",
    ["jetflow_cluster.cluster.launch", "jetflow_cluster.cluster.app", "jetflow_cluster.cluster.replica_actors"],
)
def test_processes_that_compute_nothing_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_model_is_planned_without_torchs_compiler() -> None:
    code = (
        "import sys\n"
        "from jetflow_cluster.config import EngineConfig\n"
        "from jetflow_cluster.engine.planned_memory import plan_memory\n"
        "from jetflow_cluster.engine.loading import load_engine\n"
        "plan_memory(EngineConfig(num_pages=64, max_model_len=256))\n"
        "load_engine(EngineConfig(num_pages=64, max_model_len=256))\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
