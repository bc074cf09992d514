"""One engine over several processes of this machine, joined by Gloo."""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jetflow_cluster import SamplingParams
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine import loading, planned_memory
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.engine.recording import Executing
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


@contextmanager
def _on_static_buffers(is_static: bool) -> Iterator[None]:
    """Steps are executed where ranks joined by NCCL would replay them: Gloo's collectives cannot be recorded."""
    with pytest.MonkeyPatch.context() as patch:
        if is_static:
            for user in (loading, planned_memory):
                patch.setattr(user, "why_no_graphs", lambda *_: None)
            patch.setattr(loading, "CudaGraphs", lambda device: Executing())
        yield


def _follow(
    rank: int, size: int, store: str, config: EngineConfig, is_static: bool, address: tuple[str, int], secret: bytes
) -> None:
    tp = _join(rank, size, store)
    channel = FollowerChannel(address, secret)
    with in_process(config), _on_static_buffers(is_static):
        loading.load_follower(config, tp=tp, channel=channel).run()
    leave()


def _lead(
    size: int,
    store: str,
    config: EngineConfig,
    is_static: bool,
    work: Work,
    secret: bytes,
    addresses: Any,
    results: Any,
) -> None:
    channel = LeaderChannel("127.0.0.1", 0, secret)
    addresses.put(channel.address)
    tp = _join(0, size, store)
    channel.accept(size - 1)
    with in_process(config), _on_static_buffers(is_static):
        found = _complete(config, tp, channel, work)
    channel.close()
    results.put(found)
    results.close()
    results.join_thread()
    leave()


def _complete(
    config: EngineConfig, tp: TpGroup, channel: LeaderChannel, work: Work
) -> tuple[dict[str, list[int]], int, int]:
    """Tokens by request, then how many steps ran on static buffers, without prompts and beside them. Requests join one
    by one."""
    frontend = EngineFrontend(config, tp=tp, channel=channel, tree_nodes={1: 16})
    engine = frontend.engine
    waiting = [frontend.make_request(str(i), prompt, params) for i, (prompt, params) in enumerate(work)]
    found: dict[str, list[int]] = {}
    while waiting or engine.has_work:
        if waiting and engine.num_steps % 3 == 0:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    runner = getattr(engine.compute, "__self__", None)
    if isinstance(runner, GraphRunner):
        return found, runner.num_static_steps, runner.num_mixed_steps
    return found, 0, 0


def run_on_ranks(
    config: EngineConfig,
    size: int,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    folder: Path,
    *,
    is_static: bool = False,
) -> list[list[int]]:
    """Token ids of each prompt, by `size` processes that share target and head; all on the configured device, on
    static buffers or eagerly."""
    context, secret, store = mp.get_context("spawn"), secrets.token_bytes(16), str(folder / "store")
    addresses, results = context.Queue(), context.Queue()
    shared = replace(config, tensor_parallel_size=size)
    work = list(zip(prompts, params, strict=True))
    processes = [context.Process(target=_lead, args=(size, store, shared, is_static, work, secret, addresses, results))]
    processes[0].start()
    address = addresses.get(timeout=60)
    for rank in range(1, size):
        processes.append(context.Process(target=_follow, args=(rank, size, store, shared, is_static, address, secret)))
        processes[-1].start()
    found, num_static, num_mixed = results.get(timeout=180)
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * size
    assert (num_static > 8 and num_mixed > 2) if is_static else num_static == num_mixed == 0
    return [found[str(i)] for i in range(len(prompts))]
