"""The environment variables of the project. Nothing else of it reads ``JETFLOW_*``; `jetflow_kernels`, which stands
alone, reads three that are checked here."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jetflow_kernels.machine import ISAS

_PREFIX = "JETFLOW_"
_LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the environment says; every variable is optional."""

    #: ``JETFLOW_LOG_LEVEL``: least severe message that the command line shows; ``debug`` adds tracebacks to errors.
    log_level: str = "warning"
    #: ``JETFLOW_NUM_THREADS``: CPU threads of torch; None leaves torch's own choice.
    num_threads: int | None = None
    #: ``JETFLOW_CACHE_DIR``: where measured costs and compiled CPU kernels are kept between runs; ``~`` is the home
    #: folder.
    cache_dir: Path = Path("~/.cache/jetflow")
    #: ``JETFLOW_CPU_KERNELS``: ``0`` leaves to plain torch what is otherwise compiled on first use.
    cpu_kernels: bool = True
    #: ``JETFLOW_CPU_ISA``: instruction set of the compiled CPU kernels; None is the widest that the processor has.
    cpu_isa: str | None = None
    #: ``JETFLOW_TOKEN``: bearer token for ``jetflow generate --server``; an argument would be seen by
    #: other programs of the machine.
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.log_level not in _LOG_LEVELS:
            raise ValueError(f"JETFLOW_LOG_LEVEL = {self.log_level!r}: must be one of {', '.join(_LOG_LEVELS)}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"JETFLOW_NUM_THREADS = {self.num_threads}: must be at least 1")


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Reads and checks the variables.

    Args:
        variables: what to read; None is the process's environment.

    Raises:
        ValueError: a value out of range, or a ``JETFLOW_`` variable that does not exist.
    """
    found = os.environ if variables is None else variables
    ours = {name: value for name, value in found.items() if name.startswith(_PREFIX)}
    settings = ("LOG_LEVEL", "NUM_THREADS", "CACHE_DIR", "CPU_KERNELS", "CPU_ISA", "TOKEN")
    known = {_PREFIX + name for name in settings}
    for name in sorted(ours.keys() - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        # Without its value, which may be a secret under a misspelt name.
        raise ValueError(f"{name}: no such variable; {hint}")
    threads = ours.get("JETFLOW_NUM_THREADS")
    if threads is not None and not threads.strip().isdigit():
        raise ValueError(f"JETFLOW_NUM_THREADS = {threads!r}: must be a whole number")
    cpu_kernels = ours.get("JETFLOW_CPU_KERNELS") or "1"
    if cpu_kernels not in ("0", "1"):
        raise ValueError(f"JETFLOW_CPU_KERNELS = {cpu_kernels!r}: must be 0 or 1")
    cpu_isa = ours.get("JETFLOW_CPU_ISA") or None
    if cpu_isa not in (None, *ISAS):
        raise ValueError(f"JETFLOW_CPU_ISA = {cpu_isa!r}: must be one of {', '.join(ISAS)}")
    return Environment(
        log_level=ours.get("JETFLOW_LOG_LEVEL", "warning").lower(),
        num_threads=int(threads) if threads is not None else None,
        cache_dir=Path(ours.get("JETFLOW_CACHE_DIR") or Environment.cache_dir),
        cpu_kernels=cpu_kernels == "1",
        cpu_isa=cpu_isa,
        token=ours.get("JETFLOW_TOKEN") or None,
    )
