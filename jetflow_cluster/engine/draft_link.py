"""The link between a target and a dedicated draft worker in another process.

Across it go one fused vector per committed token, blocks to be guessed and, back, candidate ids and scores. Every
wait has a deadline, so a worker that is gone or stopped cannot hold the target up.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch

from jetflow_cluster.engine.draft_runner import ContextRows, DraftBlocks, HeadDrafter
from jetflow_cluster.engine.tensor_parallel import Rows
from jetflow_cluster.parallel.sockets import send_at_once
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.coupled import DraftSampling


class LinkBrokenError(ConnectionError):
    """The worker is gone, or did not answer in time."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """Blocks to be guessed, with what `HeadDrafter.tables` needs."""

    rows: Rows
    num_slots: int
    depth: int
    width: int
    anchor_ids: list[int]
    sampling: list[DraftSampling | None]


@dataclass(frozen=True, kw_only=True)
class DraftJob:
    """One message to a worker; it answers where there is a guess or pages are asked for."""

    #: Fused vectors ``[N, hidden_size]``, their positions and slots.
    context: tuple[torch.Tensor, list[int], list[int]] | None = None
    guess: Guess | None = None
    #: Page ids whose context is wanted, for a worker that has none.
    wanted_pages: list[int] | None = None
    #: Page ids and their context, ``[num_layers, 2, len(pages), page_size, num_kv_heads, head_dim]``.
    given_pages: tuple[list[int], torch.Tensor] | None = None


class WorkerLink:
    """The target's end of a link to one incarnation of a worker."""

    def __init__(self, connection: Connection, name: str):
        self.name = name
        self._connection = connection

    def send(self, job: DraftJob) -> None:
        """Raises LinkBrokenError when the worker is gone."""
        try:
            self._connection.send_bytes(pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise LinkBrokenError(f"draft worker {self.name}: {error}") from None

    def receive(self, deadline: float) -> Any:
        """The answer, until a moment of `time.monotonic`.

        Raises:
            LinkBrokenError: the worker is gone, failed, or did not answer in time.
        """
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise LinkBrokenError(f"draft worker {self.name}: no answer in time")
            answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            if isinstance(error, LinkBrokenError):
                raise
            raise LinkBrokenError(f"draft worker {self.name} is gone") from None
        if isinstance(answer, Exception):
            raise LinkBrokenError(f"draft worker {self.name}: {answer}")
        return answer

    def close(self) -> None:
        """Lets go of the connection."""
        self._connection.close()


class LinkListener:
    """Takes in draft workers as they come and come back.

    Args:
        host: address to listen on, one that the workers reach.
        port: 0 takes a free one; see `address`.
        secret: what workers prove to know; at least 16 bytes.
        expected: what a worker must say of itself, such as the head's fingerprint and the page geometry; others are
            sent away.
    """

    def __init__(self, host: str, port: int, secret: bytes, expected: dict[str, Any]):
        if len(secret) < 16:
            raise ValueError(f"secret of {len(secret)} bytes: must be at least 16")
        self._listener = Listener((host, port), family="AF_INET", backlog=64, authkey=secret)
        self._expected = expected
        self._waiting: list[WorkerLink] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="draft-links", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for the workers."""
        host, port = self._listener.address[:2]
        return str(host), int(port)

    @property
    def num_waiting(self) -> int:
        """Workers that the next `take` gives."""
        return len(self._waiting)

    def take(self) -> list[WorkerLink]:
        """Workers that came since the last call."""
        if not self._waiting:
            return []
        with self._lock:
            found, self._waiting = self._waiting, []
        return found

    def close(self) -> None:
        """Takes in no more."""
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection = send_at_once(self._listener.accept())
                hello = pickle.loads(connection.recv_bytes())
            except Exception:
                # A stranger, or a worker that died at the door.
                if self._closed.is_set():
                    return
                continue
            wrong = {k: v for k, v in self._expected.items() if hello.get(k) != v}
            connection.send_bytes(pickle.dumps(wrong or None))
            if wrong:
                connection.close()
                continue
            with self._lock:
                self._waiting.append(WorkerLink(connection, str(hello["name"])))


class DraftWorker:
    """A worker's end: a head with its own copy of the target's embedding and output layer.

    Args:
        drafter: holds the context pages.
        page_size: slots per page.
        name: in messages and logs.
        described: what `LinkListener` expects.
    """

    def __init__(self, drafter: HeadDrafter, *, page_size: int, name: str, described: dict[str, Any]):
        self._drafter, self._page_size, self._name, self._described = drafter, page_size, name, described
        self._connection: Connection | None = None
        #: Told what begins, and an empty name when the target is waited for.
        self.on_stage: Callable[[str], None] = lambda stage: None

    def connect(self, address: tuple[str, int], secret: bytes) -> None:
        """Offers itself to the target.

        Raises:
            LinkBrokenError: nobody listens there.
            ValueError: the target serves another head, or pages of another kind; names what differs.
        """
        try:
            self._connection = send_at_once(Client((address[0], address[1]), family="AF_INET", authkey=secret))
            self._connection.send_bytes(pickle.dumps(self._described | {"name": self._name}))
            wrong = pickle.loads(self._connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise LinkBrokenError(f"{address[0]}:{address[1]}: {error}") from None
        if wrong:
            ours = {key: self._described.get(key) for key in wrong}
            raise ValueError(f"draft worker {self._name}: the target expects {wrong}, this worker has {ours}")

    def run(self) -> None:
        """Serves until the target lets go of the link. A job that fails is answered with its error."""
        assert self._connection is not None
        with torch.inference_mode():
            while True:
                try:
                    job = pickle.loads(self._connection.recv_bytes())
                except (EOFError, OSError):
                    return
                self.on_stage("absorb" if job.guess is None else "guess")
                try:
                    answer = self._do(job)
                except Exception as error:
                    answer = RuntimeError(f"{type(error).__name__}: {error}")
                self.on_stage("")
                if answer is not None:
                    try:
                        self._connection.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
                    except OSError:
                        return

    def _do(self, job: DraftJob) -> Any:
        drafter = self._drafter
        if job.given_pages is not None:
            pages, context = job.given_pages
            drafter.kv[:, :, pages] = context.to(drafter.kv.device)
        if job.context is not None:
            fused, positions, slots = job.context
            drafter.absorb_rows(ContextRows(fused=fused.to(drafter.kv.device), positions=positions, slots=slots))
        if job.wanted_pages is not None:
            return drafter.kv[:, :, job.wanted_pages].cpu()
        if job.guess is None:
            return None
        guess = job.guess
        batch = guess.rows.batch(self._page_size, drafter.kv.device)
        tables = drafter.tables(
            DraftBlocks(batch=batch, num_slots=guess.num_slots),
            depth=guess.depth,
            width=guess.width,
            anchor_ids=guess.anchor_ids,
            sampling=guess.sampling,
        )
        return [(table.ids, table.scores) for table in tables]


def tables_of(answer: list[tuple[torch.Tensor, torch.Tensor]]) -> list[CandidateTable]:
    """What a worker answered to a guess."""
    return [CandidateTable(ids=ids, scores=scores) for ids, scores in answer]
