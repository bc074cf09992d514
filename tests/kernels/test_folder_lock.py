"""Work that processes of a machine share is done once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from jetflow_kernels.folder_lock import held

_HOLD = """
import sys, time
from pathlib import Path
from jetflow_kernels.folder_lock import held
with held(Path(sys.argv[1]), 10.0) as is_held:
    print(is_held, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lock by now."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, folder, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_the_end_of_a_process_gives_its_lock_up(tmp_path: Path) -> None:
    with holder(tmp_path, 600.0) as other:
        with held(tmp_path, 0.1) as is_held:
            assert not is_held
        other.kill()
    with held(tmp_path, 5.0) as is_held:
        assert is_held


def test_a_second_process_waits(tmp_path: Path) -> None:
    with holder(tmp_path, 0.7):
        began = time.monotonic()
        with held(tmp_path, 20.0) as is_held:
            assert is_held
        assert time.monotonic() - began > 0.2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_has_no_lock(tmp_path: Path) -> None:
    with held(tmp_path / "missing", 5.0) as is_held:
        assert not is_held
