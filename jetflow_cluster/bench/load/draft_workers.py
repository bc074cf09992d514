"""Dedicated draft workers for an engine in this process: each a process of its own on this machine, without Ray."""

from __future__ import annotations

import multiprocessing
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.draft_link import DraftWorker, LinkListener
from jetflow_cluster.engine.loading import DrafterFactory, load_draft_fuser, load_draft_worker
from jetflow_cluster.engine.remote_drafter import RemoteDrafter
from jetflow_cluster.models.registry import TargetModel
from jetflow_kernels.machine import machine

#: Longest wait for a worker to load its head, and for a guess, in seconds.
_TIMEOUT_S = 120.0


@contextmanager
def draft_workers(config: EngineConfig, num_workers: int) -> Iterator[DrafterFactory]:
    """What `LLM` takes as `drafter_factory`; the machine's cores are shared out among target and workers.

    Args:
        config: of the engine.
        num_workers: at least 1.
    """
    num_threads = max(1, machine().num_cores // (1 + num_workers))
    previous, secret = torch.get_num_threads(), secrets.token_bytes(16)
    listeners: list[LinkListener] = []
    workers: list[BaseProcess] = []

    def make(target: TargetModel, num_pages: int, page_size: int) -> RemoteDrafter:
        described = {"num_pages": num_pages, "page_size": page_size}
        listener = LinkListener("127.0.0.1", 0, secret, described)
        listeners.append(listener)
        for i in range(num_workers):
            worker = multiprocessing.get_context("spawn").Process(
                target=_work,
                args=(config, listener.address, secret, described, f"worker {i}", num_threads),
                daemon=True,
            )
            worker.start()
            workers.append(worker)
        deadline = time.monotonic() + _TIMEOUT_S
        while listener.num_waiting < num_workers:
            if time.monotonic() > deadline or not all(worker.is_alive() for worker in workers):
                raise RuntimeError(f"{listener.num_waiting} of {num_workers} draft workers came in")
            time.sleep(0.05)
        fuser = load_draft_fuser(config, target)
        return RemoteDrafter(fuser, listener, page_size=page_size, device=target.device, deadline_s=_TIMEOUT_S)

    torch.set_num_threads(num_threads)
    try:
        yield make
    finally:
        torch.set_num_threads(previous)
        for worker in workers:
            worker.terminate()
        for listener in listeners:
            listener.close()


def _work(
    config: EngineConfig,
    address: tuple[str, int],
    secret: bytes,
    described: dict[str, int],
    name: str,
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    drafter = load_draft_worker(config, num_pages=described["num_pages"])
    worker = DraftWorker(drafter, page_size=described["page_size"], name=name, described=described)
    worker.connect(address, secret)
    worker.run()
