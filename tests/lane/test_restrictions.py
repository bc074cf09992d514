"""Under each restriction that a variable can make, as on another processor: the newcomer's commands work, and no output
depends on trees or on the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jetflow_kernels.machine import machine
from support.lane_run import NUM_TOKENS

pytestmark = pytest.mark.lane

ROOT = Path(__file__).parents[2]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "JETFLOW_CPU_ISA": "avx2"}
SSE42 = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "JETFLOW_CPU_ISA": "sse42"}
LIMIT_S = 300


def run(
    variables: dict[str, str], cache: Path, *, without_compiler: bool = False, cores: str | None = None
) -> dict[str, Any]:
    """What `support.lane_run` found in a process with these variables and a cache of its own."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    environment = os.environ | {"PYTHONPATH": paths, "JETFLOW_CACHE_DIR": str(cache)} | variables
    if without_compiler:
        environment["PATH"] = str(cache)
        environment.pop("CC", None)
    command = [sys.executable, "-m", "support.lane_run"]
    if cores is not None:
        command = ["taskset", "-c", cores, *command]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {len(tokens) for tokens in found["tokens"].values()} == {NUM_TOKENS}
    return found


def first_core() -> str:
    return str(min(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("isa", "variables", "onednn", "bf16"),
    [
        pytest.param("sse42", SSE42, "SSE41", "float32", id="sse4.2"),
        pytest.param("avx2", AVX2, "AVX2", "float32", id="avx2"),
        pytest.param("avx512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX512_CORE", "float32", id="avx512 no bf16"),
        pytest.param("scalar", {"JETFLOW_CPU_ISA": "scalar"}, None, None, id="scalar kernels"),
    ],
)
def test_on_another_processor(
    tmp_path: Path, isa: str, variables: dict[str, str], onednn: str | None, bf16: str | None
) -> None:
    if isa not in machine().isas:
        pytest.skip(f"{machine().processor} has no {isa}")
    found = run(variables, tmp_path)
    assert found["isa"] == isa
    assert onednn is None or (found["onednn"], found["bfloat16"]) == (onednn, bf16)


def test_as_the_machine_is_and_with_one_thread_and_one_core(tmp_path: Path) -> None:
    """The number of threads changes no token."""
    free, narrow = (run(v, tmp_path, cores=c) for v, c in (({}, None), ({"JETFLOW_NUM_THREADS": "1"}, first_core())))
    assert narrow["num_cores"] == 1
    assert (narrow["tokens"], narrow["outputs"]) == (free["tokens"], free["outputs"])


def test_without_a_compiler(tmp_path: Path) -> None:
    assert run({}, tmp_path, without_compiler=True)["isa"] == ""
