"""A target whose draft heads are elsewhere, over real links, with workers in threads of the test's process."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetflow_cluster import LLM
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.draft_link import DraftWorker, LinkListener
from jetflow_cluster.engine.loading import load_draft_fuser, load_draft_worker
from jetflow_cluster.engine.remote_drafter import RemoteDrafter
from jetflow_cluster.models.registry import TargetModel
from support.pretend_gpu import in_thread
from support.small_models import write_head, write_target

PAGES, PAGE = 64, 16
SECRET = secrets.token_bytes(16)


@dataclass
class RemoteHeads:
    """A target whose draft heads are elsewhere, and what its workers need."""

    config: EngineConfig
    listener: LinkListener
    deadline_s: float = 20.0
    drafters: list[RemoteDrafter] = field(default_factory=list)

    def llm(self, **options: Any) -> LLM:
        def make(target: TargetModel, num_pages: int, page_size: int) -> RemoteDrafter:
            assert num_pages <= PAGES
            fuser = load_draft_fuser(self.config, target)
            self.drafters.append(
                RemoteDrafter(
                    fuser, self.listener, page_size=page_size, device=target.device, deadline_s=self.deadline_s
                )
            )
            return self.drafters[-1]

        # Every guess comes from the workers.
        given = {"num_pages": PAGES, "tree_nodes": {1: 16}, "context_lookup": False} | options
        return LLM(self.config.model, None, dtype=self.config.dtype, drafter_factory=make, **given)

    def start_worker(self, name: str) -> DraftWorker:
        drafter = load_draft_worker(self.config, num_pages=PAGES)
        worker = DraftWorker(drafter, page_size=PAGE, name=name, described={"num_pages": PAGES})
        worker.connect(self.listener.address, SECRET)
        threading.Thread(target=self._serve, args=(worker,), daemon=True).start()
        return worker

    def _serve(self, worker: DraftWorker) -> None:
        with in_thread(self.config):
            worker.run()


@contextmanager
def remote_heads(folder: Path) -> Iterator[RemoteHeads]:
    """A small target and its head, written to a folder, and an open door for workers."""
    target, head = folder / "target", folder / "head"
    target.mkdir()
    head.mkdir()
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    config = EngineConfig(model=str(target), draft_head=str(head), dtype="float64", num_pages=PAGES, page_size=PAGE)
    listener = LinkListener("127.0.0.1", 0, SECRET, {"num_pages": PAGES})
    yield RemoteHeads(config, listener)
    listener.close()


def kill(worker: DraftWorker) -> None:
    """Ends the connection under the worker, as the death of its process would."""
    assert worker._connection is not None
    with socket.socket(fileno=os.dup(worker._connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def wait_for(setup: RemoteHeads, num: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        setup.drafters[-1].admit()
        if setup.drafters[-1].num_workers == num:
            return
        time.sleep(0.01)
    raise AssertionError(f"{setup.drafters[-1].num_workers} workers, not {num}")
