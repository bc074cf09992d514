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
from support.lane_run import NUM_TOKENS, has_compiler

pytestmark = pytest.mark.lane

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
AVX2 = ONE_THREAD | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "JETFLOW_CPU_ISA": "avx2"}
AVX512 = ONE_THREAD | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
SSE42 = ONE_THREAD | {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "JETFLOW_CPU_ISA": "sse42"}
LIMIT_S = 300


def environment_of(variables: dict[str, str], cache: Path) -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    return os.environ | {"PYTHONPATH": paths, "JETFLOW_CACHE_DIR": str(cache)} | variables


def run(
    variables: dict[str, str], cache: Path, *, without_compiler: bool = False, cores: str | None = None
) -> dict[str, Any]:
    """What `support.lane_run` found in a process with these variables and a cache of its own."""
    environment = environment_of(variables, cache)
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
        pytest.param(
            "avx512", ONE_THREAD | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX512_CORE", "float32", id="avx512 no bf16"
        ),
        pytest.param("scalar", ONE_THREAD | {"JETFLOW_CPU_ISA": "scalar"}, None, None, id="scalar kernels"),
    ],
)
def test_on_another_processor(
    tmp_path: Path, isa: str, variables: dict[str, str], onednn: str | None, bf16: str | None
) -> None:
    if isa not in machine().isas:
        pytest.skip(f"{machine().processor} has no {isa}")
    found = run(variables, tmp_path)
    assert found["isa"] == (isa if has_compiler() else "")
    assert onednn is None or (found["onednn"], found["bfloat16"]) == (onednn, bf16)


def test_as_the_machine_is_and_with_one_thread_and_one_core(tmp_path: Path) -> None:
    """The number of threads changes no token."""
    free, narrow = (run(v, tmp_path, cores=c) for v, c in (({}, None), ({"JETFLOW_NUM_THREADS": "1"}, first_core())))
    assert narrow["num_cores"] == 1
    assert (narrow["tokens"], narrow["outputs"]) == (free["tokens"], free["outputs"])


def test_without_a_compiler(tmp_path: Path) -> None:
    assert run(ONE_THREAD, tmp_path, without_compiler=True)["isa"] == ""


@pytest.mark.skipif("avx2" not in machine().isas, reason="this processor has no AVX2")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_served_with_avx2(tmp_path: Path, dtype: str) -> None:
    """The same tokens as the engine in the command's own process."""
    environment = environment_of(AVX2, tmp_path)
    command = [sys.executable, "-m", "jetflow_cluster"]
    asked = ["generate", "def quicksort(items):", "--max-tokens", "24", "--json"]
    serve = [*command, "serve", "grpc_port=0", "http_port=none", "max_num_requests=4", f"dtype={dtype}"]
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(serve, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            address = next(line.split()[-1] for line in server.stdout if line.startswith("serving at"))
            served = json.loads(subprocess.check_output([*command, *asked, "--server", address], env=environment))
        finally:
            server.terminate()
            server.wait(LIMIT_S)
    local = [*asked, "--dtype", dtype, "--speculation", "off"]
    alone = json.loads(subprocess.check_output([*command, *local], env=environment))
    assert served["token_ids"] == alone["token_ids"]
