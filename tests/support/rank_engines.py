"""One engine over several processes of this machine, joined by Gloo."""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jetflow_cluster import SamplingParams
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.loading import load_follower
from jetflow_cluster.parallel.channel import FollowerChannel, LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup
from support.pretend_gpu import in_process

Work = list[tuple[list[int], SamplingParams]]


def _join(rank: int, size: int, store: str) -> TpGroup:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, init_method=f"file://{store}", timeout=datetime.timedelta(seconds=120)
    )
    return TpGroup.from_process_group()


def leave() -> NoReturn:
    """Ends a rank that did its work. At an interpreter's own end the threads of Gloo may be taken down in an order that
    aborts the process, on a busy machine now and then."""
    dist.destroy_process_group()
    os._exit(0)


def _follow(rank: int, size: int, store: str, config: EngineConfig, address: tuple[str, int], secret: bytes) -> None:
    tp = _join(rank, size, store)
    channel = FollowerChannel(address, secret)
    with in_process(config):
        load_follower(config, tp=tp, channel=channel).run()
    leave()


def _lead(size: int, store: str, config: EngineConfig, work: Work, secret: bytes, addresses: Any, results: Any) -> None:
    channel = LeaderChannel("127.0.0.1", 0, secret)
    addresses.put(channel.address)
    tp = _join(0, size, store)
    channel.accept(size - 1)
    with in_process(config):
        found = _complete(config, tp, channel, work)
    channel.close()
    results.put(found)
    results.close()
    results.join_thread()
    leave()


def _complete(config: EngineConfig, tp: TpGroup, channel: LeaderChannel, work: Work) -> dict[str, list[int]]:
    frontend = EngineFrontend(config, tp=tp, channel=channel, tree_nodes={1: 16})
    for i, (prompt, params) in enumerate(work):
        frontend.engine.add(frontend.make_request(str(i), prompt, params))
    found: dict[str, list[int]] = {}
    while frontend.engine.has_work:
        for delta in frontend.engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def run_on_ranks(
    config: EngineConfig, size: int, prompts: Sequence[list[int]], params: Sequence[SamplingParams], folder: Path
) -> list[list[int]]:
    """Token ids of each prompt, by `size` processes that share target and head; all on the configured device."""
    context, secret, store = mp.get_context("spawn"), secrets.token_bytes(16), str(folder / "store")
    addresses, results = context.Queue(), context.Queue()
    shared = replace(config, tensor_parallel_size=size)
    work = list(zip(prompts, params, strict=True))
    processes = [context.Process(target=_lead, args=(size, store, shared, work, secret, addresses, results))]
    processes[0].start()
    address = addresses.get(timeout=60)
    for rank in range(1, size):
        processes.append(context.Process(target=_follow, args=(rank, size, store, shared, address, secret)))
        processes[-1].start()
    found = results.get(timeout=180)
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * size
    return [found[str(i)] for i in range(len(prompts))]
