"""What the processes of one replica tell each other while it starts, and how one of them ends. Loads no torch."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import NoReturn

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Doors:
    """Where rank 0 is reached by the other ranks."""

    #: Host and port of the rendezvous, and of the plan channel.
    store: tuple[str, int]
    channel: tuple[str, int]
    secret: bytes


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What draft workers must know of rank 0."""

    #: Where they come in; None where the head is colocated.
    links: tuple[str, int] | None
    num_pages: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """What rank 0 serves."""

    #: Host and port of the data plane, with the secret that lets routers in.
    address: str
    #: Seconds by phase of the start.
    phases: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor runs."""

    node: str
    #: 0 where it is not known.
    pid: int
    #: The file that its standard error goes to, or the folder of all such files.
    log: str


def die(why: str) -> NoReturn:
    """Ends the process at once, whatever its threads are in."""
    _log.critical(why)
    logging.shutdown()
    os._exit(1)
