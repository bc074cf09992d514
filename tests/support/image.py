"""Builds and runs a Dockerfile in a fresh folder where there is no daemon: its steps in order, in a new root.

What is not Docker's: the image that ``FROM`` names is made by debootstrap out of the same release of Debian, whose own
Python is that version (`_make_base`); pip finds packages where this machine's pip is configured to; layers, caches and
published ports are not there. Needs root, debootstrap and util-linux.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

_CONTAINED = Path(__file__).with_name("contained.py")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What the official image of Python brings beside Python.
_BASE_PACKAGES = "ca-certificates,netbase,tzdata,python3,python3-pip"
_KNOWN = ("FROM", "ARG", "ENV", "COPY", "RUN", "WORKDIR", "USER", "EXPOSE", "ENTRYPOINT", "CMD")


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile."""

    instruction: str
    arguments: str


def read_steps(text: str) -> list[Step]:
    """Of a Dockerfile, with continued lines joined. Raises ValueError for an instruction that is not executed here."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    steps = [Step(*line.strip().split(None, 1)) for line in joined.splitlines() if line.strip()]
    for step in steps:
        if step.instruction not in _KNOWN:
            raise ValueError(f"{step.instruction}: must be one of {', '.join(_KNOWN)}")
    return steps


def context_files(folder: Path) -> list[Path]:
    """What a builder is sent of a folder, relative to it: all but what ``.dockerignore`` leaves out."""
    rules = [line.strip() for line in (folder / ".dockerignore").read_text().splitlines()]
    rules = [rule.rstrip("/") for rule in rules if rule and not rule.startswith("#")]
    patterns = [(re.compile(_pattern(rule.lstrip("!"))), rule.startswith("!")) for rule in rules]
    named = [rule[1:] for rule in rules if rule.startswith("!")]
    found: list[Path] = []

    def is_sent(relative: Path) -> bool:
        names = [str(relative), *(str(parent) for parent in relative.parents if parent.name)]
        # The last rule that matches a path, or a folder that it is in, decides.
        deciding = [sends for pattern, sends in patterns if any(pattern.fullmatch(name) for name in names)]
        return deciding[-1] if deciding else True

    for path, folders, files in os.walk(folder):
        inner = Path(path).relative_to(folder)
        # Nothing of the ignored folders is looked at, unless a rule brings some of it back.
        folders[:] = [
            name
            for name in folders
            if is_sent(inner / name) or any(f"{rule}/".startswith(f"{inner / name}/") for rule in named)
        ]
        found += [inner / name for name in files if is_sent(inner / name)]
    return sorted(found)


def _pattern(rule: str) -> str:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", rule))


@dataclass
class Image:
    """A root folder and how a process is started in it."""

    root: Path
    context: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    ports: list[int] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def build(self, dockerfile: Path) -> None:
        """Executes the steps. Raises CalledProcessError or OSError where one fails."""
        for step in read_steps(dockerfile.read_text()):
            print(f"{step.instruction} {step.arguments[:100]}", flush=True)
            getattr(self, f"_{step.instruction.lower()}")(self._with_values(step))

    def _with_values(self, step: Step) -> str:
        """``$NAME`` is replaced in all but what a shell or the program itself reads."""
        if step.instruction in ("RUN", "CMD", "ENTRYPOINT"):
            return step.arguments
        known = self.args | self.env
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), step.arguments)

    def _from(self, name: str) -> None:
        found = re.fullmatch(r"python:(3\.\d+)-slim-(\w+)", name)
        if found is None:
            raise ValueError(f"FROM {name}: must be python:VERSION-slim-RELEASE, which debootstrap can stand in for")
        _make_base(self.root, python=found[1], release=found[2])
        write_pip_configuration(self.root)

    def _arg(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if equals:
            self.args.setdefault(name, value)

    def _env(self, text: str) -> None:
        self.env |= dict(pair.split("=", 1) for pair in shlex.split(text))

    def _copy(self, text: str) -> None:
        *sources, target = shlex.split(text)
        folder = self.root / os.path.normpath(os.path.join(self.workdir, target)).lstrip("/")
        sent = list(context_files(self.context))
        for source in sources:
            base = Path(os.path.normpath(source))
            found = [path for path in sent if path == base or base in path.parents]
            if not found:
                raise FileNotFoundError(f"COPY {source}: nothing of that name is in the context")
            for path in found:
                # A folder's content is copied, and not the folder.
                inner = path.name if path == base else str(path.relative_to(base))
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / path, folder / inner)

    def _run(self, command: str) -> None:
        local = local_paths(pip_settings())
        subprocess.run(self._call(["/bin/sh", "-c", command], self.args, local), check=True, stdin=subprocess.DEVNULL)

    def _workdir(self, path: str) -> None:
        self.workdir = os.path.normpath(os.path.join(self.workdir, path))
        (self.root / self.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, name: str) -> None:
        self.user = name
        self.identity()

    def _expose(self, text: str) -> None:
        self.ports += [int(port) for port in text.split()]

    def _entrypoint(self, text: str) -> None:
        self.entrypoint = json.loads(text)

    def _cmd(self, text: str) -> None:
        self.command = json.loads(text)

    def identity(self) -> tuple[int, int, str]:
        """Number, group and home of the user. Raises ValueError where the image has no such user."""
        for line in (self.root / "etc" / "passwd").read_text().splitlines():
            name, _, uid, gid, _, home, _ = line.split(":")
            if name == self.user:
                return int(uid), int(gid), home
        raise ValueError(f"USER {self.user}: /etc/passwd of the image has no such user")

    def _call(
        self, command: list[str], env: dict[str, str], binds: list[str], *, own_network: bool = False
    ) -> list[str]:
        uid, gid, home = self.identity()
        container = {
            "root": str(self.root),
            "workdir": self.workdir,
            "uid": uid,
            "gid": gid,
            "env": {"HOME": home} | env | self.env,
            "binds": binds,
            "own_network": own_network,
        }
        spaces = ["--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", *(["--net"] if own_network else [])]
        return ["unshare", *spaces, "--", sys.executable, str(_CONTAINED), json.dumps(container), *command]

    def start(self, log: Path) -> Container:
        """``docker run``, with a network of its own in which there is loopback alone."""
        with log.open("wb") as output:
            call = self._call([*self.entrypoint, *self.command], {}, [], own_network=True)
            outer = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        # Until it has changed its root, what is called within would be called on this machine.
        while not (pid := _first_process(outer.pid, self.root)):
            if outer.poll() is not None or time.monotonic() > deadline:
                outer.kill()
                raise OSError(f"the container did not start: {log.read_text()}")
            time.sleep(0.1)
        return Container(image=self, outer=outer, pid=pid, log=log)


def _first_process(outer: int, root: Path) -> int | None:
    """Of the namespaces that `outer` made, as this machine counts; None until its root is `root`."""
    try:
        (pid,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(pid) if Path(f"/proc/{pid}/root").readlink() == root else None
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Container:
    """A started image."""

    image: Image
    outer: subprocess.Popen[bytes]
    pid: int
    log: Path

    def execute(self, *command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """``docker exec``: as the image's user, in its folder and environment."""
        uid, gid, home = self.image.identity()
        env = [f"{name}={value}" for name, value in ({"HOME": home} | self.image.env).items()]
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-i", "-u", "-r", "-S", str(uid), "-G", str(gid)]
        inner = ["/usr/bin/env", "-i", "-C", self.image.workdir, *env, *command]
        return subprocess.run(
            [*enter, "--", *inner], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )

    def kill(self) -> None:
        """``docker kill``: all its processes end with the first."""
        self.outer.kill()
        self.outer.wait()


def _make_base(root: Path, *, python: str, release: str) -> None:
    """Debian with its own Python, put where the official image has it by name and by rights."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", release, str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    if not (root / "usr" / "bin" / f"python{python}").exists():
        raise FileNotFoundError(f"python{python}: Debian {release} has another Python")
    (root / "usr" / "bin" / "python").symlink_to("python3")
    # Debian keeps pip from its own folders; the official image's Python is nobody's.
    (root / "usr" / "lib" / f"python{python}" / "EXTERNALLY-MANAGED").unlink()
    # Headers, without the compiler's that their package would bring.
    unpack = f"cd /tmp && apt-get download libpython{python}-dev && dpkg-deb -x libpython{python}-dev*.deb x"
    subprocess.run(
        ["chroot", str(root), "sh", "-c", f"{unpack} && cp -r x/usr/include /usr/ && rm -r x *.deb"], check=True
    )


def pip_settings() -> dict[str, str]:
    """What this machine's pip is configured to: where it finds packages."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE)
    return {name: value.replace("\\n", "\n") for name, value in pairs}


def local_paths(settings: dict[str, str]) -> list[str]:
    """Files and folders that the settings name."""
    words = [word for value in settings.values() for word in value.split()]
    # Files of an index on disk lie beside it.
    paths = [str(Path(urlparse(word).path).parent) if word.startswith("file:") else word for word in words]
    return sorted({path for path in paths if path.startswith("/") and Path(path).exists()})


def write_pip_configuration(root: Path) -> None:
    """The same in the new root; what is local is mounted there while steps run."""
    lines = [f"{name} = " + value.replace("\n", "\n  ") for name, value in pip_settings().items()]
    (root / "etc" / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
