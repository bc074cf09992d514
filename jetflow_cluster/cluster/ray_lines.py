"""What Ray prints of its cluster's logs in the process that started it, with less of it let through."""

from __future__ import annotations

import re
from typing import Any, TextIO

#: Before each line of a log, in colours: ``(ShardActor pid=123)`` or ``(raylet)``.
_PREFIX = re.compile(r"^[\x1b\[0-9;m\s]*\((?:(?P<name>\S+) )?(?:pid=\d+|raylet|autoscaler)[^)]*\)")
_OURS = re.compile(r"ServeReplica:\S+:(EngineReplica|Router|Directory)|ShardActor|DraftActor")
#: As `observability` writes messages, in JSON or as text.
_MESSAGE = re.compile(r'\{"time": |\d{4}-\d\d-\d\d [\d:,]+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) .* jetflow_cluster\.')
_WARNING = re.compile(r'"level": "WARNING"|^\S*\(.*\)\S* [\d-]+ [\d:,]+ WARNING ')


class RayLines:
    """A stream that Ray may print to: lines of this project's processes are let through, and only warnings while
    the cluster starts, for errors are then reported by what started it. All lines are in Ray's files too.

    Args:
        stream: where the rest goes, as does what is no such line.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_dropped = False
        #: Whether the cluster starts.
        self.is_starting = True

    def write(self, text: str) -> int:
        """Takes whole lines, or parts of which the first has the prefix; as ``print`` gives them."""
        kept = []
        for line in text.splitlines(keepends=True):
            if line.strip("\r\n"):
                self._is_dropped = not self._lets_through(line)
            if not self._is_dropped:
                kept.append(line)
        self._stream.write("".join(kept))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lets_through(self, line: str) -> bool:
        prefix = _PREFIX.match(line)
        if prefix is None:
            return True
        is_message = _OURS.search(prefix["name"] or "") is not None and _MESSAGE.search(line) is not None
        return is_message and (not self.is_starting or _WARNING.search(line) is not None)
