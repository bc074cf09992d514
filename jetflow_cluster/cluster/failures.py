"""Why a part of the cluster could not start: one sentence with actor, node, cause and log, on its way to the user.

Serve passes on no exception of a deployment's constructor but the text of its traceback, in the deployment's status
message. So the sentence is the text of an exception of this module, by whose name it is found again.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.util import get_node_ip_address

from jetflow_cluster.cluster.handshake import Place

_log = logging.getLogger(__name__)
#: Kinds of error whose text is made for the user; others are shown with their name.
_TOLD = (ValueError, OSError, RuntimeError, ImportError)


class StartError(RuntimeError):
    """Something could not start, and would not another time. The text is the whole sentence."""


class LostError(StartError):
    """A process was lost while it started, or did not answer; another time it may not be."""


def own_place() -> Place:
    """Of this process."""
    path = os.readlink("/proc/self/fd/2") if Path("/proc/self/fd/2").exists() else ""
    return Place(node=get_node_ip_address(), pid=os.getpid(), log=path if path.startswith("/") else "standard error")


def failed_start(name: str, place: Place, error: BaseException) -> StartError:
    """The error to raise where an actor could not start.

    Args:
        name: of the actor.
        place: where it runs or ran.
        error: its own, or what Ray made of it.
    """
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, StartError):
        return cause
    where, log = f"{name} on node {place.node}", f"log: {place.log}"
    if isinstance(cause, ray.exceptions.RayError):
        return LostError(f"{where}: {_why_lost(cause, place)}; {log}")
    return StartError(f"{where}: {_sentence(cause)}; {log}")


@contextmanager
def starting(name: str) -> Iterator[None]:
    """Around the start of an actor or a replica of Serve: what fails is logged in full and raised as a `StartError`.

    Raises:
        StartError: the only thing that is raised.
    """
    try:
        yield
    except Exception as error:
        _log.error("%s could not start", name, exc_info=True)
        # Serve formats the traceback into its status message. This process is of no more use.
        sys.tracebacklimit = 0
        raise failed_start(name, own_place(), error) from None


def read_failure(message: str) -> StartError | None:
    """The error that a status message of Serve names; None where it names none of this module's."""
    kinds = {kind.__name__: kind for kind in (StartError, LostError)}
    found = re.search(rf"{re.escape(__name__)}\.({'|'.join(kinds)}): (.+)$", message, re.MULTILINE)
    return kinds[found[1]](found[2]) if found is not None else None


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, _TOLD) else f"{type(error).__name__} {text}".rstrip()


def _why_lost(error: ray.exceptions.RayError, place: Place) -> str:
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return "has not answered in time"
    if isinstance(error, ray.exceptions.RayActorError):
        process = f"its process {place.pid}" if place.pid else "its process"
        return f"{process} ended while it started (killed, out of memory, or crashed)"
    return _sentence(error)
