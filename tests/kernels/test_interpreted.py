"""Runs `interpreted/*_cases.py`: the Triton kernels in triton's interpreter, or on a GPU if there is one.

The interpreter is chosen when triton is imported, so the cases have a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
CASES = sorted((Path(__file__).parent / "interpreted").glob("*_cases.py"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem.removesuffix("_cases"))
def test_kernel(path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
