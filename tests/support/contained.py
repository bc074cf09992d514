"""Runs a command with another folder as its root, as a container's process: a program that `support.image` calls.

    unshare --mount --pid ... python contained.py CONTAINER COMMAND ...

CONTAINER is JSON: ``root``, ``workdir``, ``uid``, ``gid``, ``env``, ``binds`` (paths of this machine that are seen
inside, read-only) and ``own_network``. The namespaces are unshare's.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
#: Docker's own.
SHM_BYTES = 64 * 2**20


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _mount_all(root: Path, binds: list[str]) -> None:
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "dev"))
    for name in _DEVICES:
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    for name in ("shm", "pts"):
        (root / "dev" / name).mkdir()
    _mount("-t", "tmpfs", "-o", f"size={SHM_BYTES},mode=1777", "tmpfs", str(root / "dev" / "shm"))
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", str(root / "dev" / "pts"))
    (root / "dev" / "ptmx").symlink_to("pts/ptmx")
    (root / "dev" / "fd").symlink_to("/proc/self/fd")
    for path in binds:
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _mount("--bind", "-o", "ro", path, str(target))


def _raise_loopback() -> None:
    """Sets the flags up and running of ``lo``, which a new network namespace has down."""
    siocsifflags, up_and_running = 0x8914, 0x41
    with socket.socket() as probe:
        fcntl.ioctl(probe, siocsifflags, struct.pack("16sh14x", b"lo", up_and_running))


def main(container: dict[str, Any], command: list[str]) -> None:
    """Mounts, changes root and user, and becomes the command."""
    root = Path(container["root"])
    _mount_all(root, container["binds"])
    if container["own_network"]:
        _raise_loopback()
    os.chroot(root)
    os.chdir(container["workdir"])
    os.setgroups([])
    os.setgid(container["gid"])
    os.setuid(container["uid"])
    os.umask(0o022)
    os.execvpe(command[0], command, container["env"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
