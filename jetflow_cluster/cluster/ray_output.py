"""What Ray and its processes print, in a file of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


@contextmanager
def ray_output_in(path: Path) -> Iterator[None]:
    """Within it, what this process prints goes to a file, and so do Ray's messages, which it prints from threads of its
    own: also of processes that were ended on purpose. Who has something to show keeps the streams from before.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        # Serve's has handlers of its own, and passes nothing on.
        loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
        previous = [(logger.handlers[:], logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.handlers[:], logger.propagate = [handler], False
        try:
            with redirect_stdout(file), redirect_stderr(file):
                yield
        finally:
            for logger, (handlers, propagates) in zip(loggers, previous, strict=True):
                logger.handlers[:], logger.propagate = handlers, propagates
