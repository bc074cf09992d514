"""Runs `interpreted/*_cases.py`: the Triton kernels in triton's interpreter, or on a GPU if there is one.

The interpreter is chosen when triton is imported, so the cases have a process of their own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from support.beside import Command, Ended

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
CASES = sorted((Path(__file__).parent / "interpreted").glob("*_cases.py"))


def _command(path: Path) -> Command:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(path)]
    return Command(name=path.stem, arguments=arguments, environment=environment)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.beside(_command(path))) for path in CASES],
    ids=lambda path: path.stem.removesuffix("_cases"),
)
def test_kernel(path: Path, ended: Ended) -> None:
    assert ended.status == 0, f"{path.name}: {ended.output[-6000:]}{ended.errors[-2000:]}"
