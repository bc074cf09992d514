"""One engine over several processes of this machine, joined by Gloo, or by NCCL where each has a GPU."""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jetflow_cluster import SamplingParams
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine import loading, recorded_steps, static_step
from jetflow_cluster.engine.bucket import Bucket
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.graph_runner import GraphRunner
from jetflow_cluster.parallel.channel import FollowerChannel, LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.accept_tree import SamplingTable, VerifiedTrees, WalkBuffers
from support.pretend_gpu import in_process

#: Buckets that are kept, so few that some are made again.
MAX_KEPT = 3


@dataclass(frozen=True, kw_only=True)
class RanksRun:
    """What became of a run."""

    #: Of each prompt.
    token_ids: list[list[int]]
    num_steps: int
    #: Of the steps on static buffers, in order.
    buckets: list[Bucket]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What every rank is told."""

    config: EngineConfig
    size: int
    backend: str
    store: str
    #: Whether steps are executed where they would be recorded.
    is_static: bool
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def join(self, rank: int) -> TpGroup:
        torch.set_num_threads(1)
        if self.backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            self.backend,
            rank=rank,
            world_size=self.size,
            init_method=f"file://{self.store}",
            timeout=datetime.timedelta(seconds=120),
        )
        return TpGroup.from_process_group()


class Rehearsing:
    """Executes in place of recording, with the runs that a recording takes: those of all ranks meet."""

    def record(self, launches: Callable[[], object]) -> Callable[[], object]:
        """The launches, done twice."""
        for _ in range(2):
            launches()
        return launches


@contextmanager
def _on_static_buffers(rank: int, group: _Group) -> Iterator[None]:
    """Steps are executed where ranks joined by NCCL would replay them: Gloo's collectives cannot be recorded. Other
    ranks than the first guess and choose wrongly."""
    with pytest.MonkeyPatch.context() as patch:
        if group.is_static:
            patch.setattr(TpGroup, "may_be_recorded", True)
            patch.setattr(loading, "CudaGraphs", lambda device: Rehearsing())
        patch.setattr(recorded_steps, "MAX_KEPT", MAX_KEPT)
        if rank:
            patch.setattr(static_step, "device_tables", _wrong_tables(static_step.device_tables))
            patch.setattr(static_step, "accept_tree", _accept_wrongly)
        yield


def _wrong_tables(tables: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scores = tables(*args)
        return ids.flip(-1), scores // 2

    return wrong


def _accept_wrongly(verified: VerifiedTrees, table: SamplingTable | None, walk: WalkBuffers) -> None:
    for tensor, value in ((walk.nodes, 0), (walk.token_ids, 1), (walk.lengths, 1)):
        tensor.fill_(value)


def leave() -> NoReturn:
    """Ends a rank that did its work. At an interpreter's own end the threads of Gloo may be taken down in an order that
    aborts the process, on a busy machine now and then, and those of NCCL wait for the graphs that hold its collectives.
    """
    os._exit(0)


def _follow(rank: int, group: _Group, address: tuple[str, int]) -> None:
    tp = group.join(rank)
    channel = FollowerChannel(address, group.secret)
    with in_process(group.config), _on_static_buffers(rank, group):
        loading.load_follower(group.config, tp=tp, channel=channel).run()
    leave()


def _lead(
    group: _Group, prompts: Sequence[list[int]], params: Sequence[SamplingParams], addresses: Any, results: Any
) -> None:
    channel = LeaderChannel("127.0.0.1", 0, group.secret)
    addresses.put(channel.address)
    tp = group.join(0)
    channel.accept(group.size - 1)
    with in_process(group.config), _on_static_buffers(0, group):
        found = _complete(group.config, tp, channel, prompts, params)
    results.put(found)
    results.close()
    results.join_thread()
    channel.close()
    leave()


def _complete(
    config: EngineConfig,
    tp: TpGroup,
    channel: LeaderChannel,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
) -> RanksRun:
    """Requests join one by one."""
    frontend = EngineFrontend(config, tp=tp, channel=channel, tree_nodes={1: 16})
    engine, buckets = frontend.engine, []
    runner = getattr(engine.compute, "__self__", None)
    if isinstance(runner, GraphRunner):
        get = runner.steps.get
        runner.steps.get = lambda bucket, **how: buckets.append(bucket) or get(bucket, **how)
    waiting = [frontend.make_request(str(i), *given) for i, given in enumerate(zip(prompts, params, strict=True))]
    found: dict[str, list[int]] = {request.request_id: [] for request in waiting}
    num_looks = 0
    while waiting or engine.has_work:
        if waiting and num_looks % 3 == 0:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            found[delta.request_id].extend(delta.token_ids)
        num_looks += 1
    return RanksRun(token_ids=list(found.values()), num_steps=engine.num_steps, buckets=buckets)


def run_on_ranks(
    config: EngineConfig,
    size: int,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    folder: Path,
    *,
    backend: str = "gloo",
    is_static: bool = False,
) -> RanksRun:
    """Completes prompts by `size` processes that share target and head; all on the configured device. Gloo's ranks
    compute eagerly unless `is_static`."""
    context = mp.get_context("spawn")
    addresses, results = context.Queue(), context.Queue()
    shared = replace(config, tensor_parallel_size=size)
    group = _Group(config=shared, size=size, backend=backend, store=str(folder / "store"), is_static=is_static)
    processes = [context.Process(target=_lead, args=(group, prompts, params, addresses, results), daemon=True)]
    processes[0].start()
    address = addresses.get(timeout=60)
    for rank in range(1, size):
        processes.append(context.Process(target=_follow, args=(rank, group, address), daemon=True))
        processes[-1].start()
    found: RanksRun = results.get(timeout=180)
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * size
    return found
