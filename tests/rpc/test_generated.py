"""The committed code is what the generator makes of ``protos/``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RPC = Path("jetflow_cluster/rpc")


@pytest.mark.parametrize("package, num_files", [("v1", 6), ("oip", 3)])
def test_generated_code_is_that_of_the_protos(tmp_path: Path, package: str, num_files: int) -> None:
    folder = RPC / package
    pytest.importorskip("grpc_tools")
    sources = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos" / folder).glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}", *outputs, *sources]
    subprocess.run(command, check=True, cwd=ROOT)
    made = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / folder).glob("*_pb2*")}
    assert len(made) == num_files
    assert made == kept, "run `make protos`"
