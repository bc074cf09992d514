"""The committed code is what the generator makes of ``protos/``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = Path("jetflow_cluster/rpc/v1")


def test_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    sources = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos" / PACKAGE).glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}", *outputs, *sources]
    subprocess.run(command, check=True, cwd=ROOT)
    made = {path.name: path.read_bytes() for path in (tmp_path / PACKAGE).iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / PACKAGE).glob("*_pb2*")}
    assert len(made) == 6
    assert made == kept, "run `make protos`"
