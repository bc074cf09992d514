"""Work that the processes of a machine share: one does it, the others wait and find it done."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOK_S = 0.05


@contextmanager
def held(folder: Path, limit_s: float) -> Iterator[bool]:
    """Holds the lock of a folder; the end of a process gives up what it holds.

    Yields whether it is held. It is not where another process, perhaps a stopped one, holds it for longer than
    `limit_s`, or the file system knows no such locks: then each does the work for itself.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, limit_s)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
        except OSError:
            return False
        else:
            return True
