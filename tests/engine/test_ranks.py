"""An engine over several processes gives the tokens of an engine in one."""

from __future__ import annotations

import datetime
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.loading import load_follower
from jetflow_cluster.parallel.channel import FollowerChannel, LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup
from support.small_models import write_head, write_target

PROMPTS = [[1, 2, 3], list(range(40, 75)), [7] * 20, [200], list(range(100, 163))]


def params(i: int) -> SamplingParams:
    sampled = {"temperature": 0.8, "top_p": 0.9} if i % 2 else {"temperature": 0.0}
    options = SpeculationOptions(mode="force" if i % 3 else "off", max_tree_nodes=16)
    return SamplingParams(max_tokens=24, seed=i, ignore_eos=True, speculation=options, **sampled)


def _join(rank: int, size: int, store: str) -> TpGroup:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, init_method=f"file://{store}", timeout=datetime.timedelta(seconds=120)
    )
    return TpGroup.from_process_group()


def _follow(rank: int, size: int, store: str, config: EngineConfig, address: tuple[str, int], secret: bytes) -> None:
    tp = _join(rank, size, store)
    channel = FollowerChannel(address, secret)
    load_follower(config, tp=tp, channel=channel).run()
    dist.destroy_process_group()


def _lead(size: int, store: str, config: EngineConfig, channel: LeaderChannel, results: Any) -> None:
    tp = _join(0, size, store)
    channel.accept(size - 1)
    frontend = EngineFrontend(config, tp=tp, channel=channel, tree_nodes={1: 16})
    for i, prompt in enumerate(PROMPTS):
        frontend.engine.add(frontend.make_request(str(i), prompt, params(i)))
    found: dict[str, list[int]] = {}
    while frontend.engine.has_work:
        for delta in frontend.engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    channel.close()
    dist.destroy_process_group()
    results.put(found)


def _lead_alone(size: int, store: str, config: EngineConfig, secret: bytes, addresses: Any, results: Any) -> None:
    channel = LeaderChannel("127.0.0.1", 0, secret)
    addresses.put(channel.address)
    _lead(size, store, config, channel, results)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_give_the_tokens_of_one(size: int, tmp_path: Path) -> None:
    target, head = tmp_path / "target", tmp_path / "head"
    target.mkdir()
    head.mkdir()
    write_target(target, seed=3, num_layers=4)
    write_head(head, target, seed=4)
    config = EngineConfig(model=str(target), draft_head=str(head), dtype="float64", num_pages=64)
    llm = LLM(str(target), str(head), dtype="float64", num_pages=64, tree_nodes={1: 16})
    expected = [o.token_ids for o in llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])]

    context, secret, store = mp.get_context("spawn"), secrets.token_bytes(16), str(tmp_path / "store")
    addresses, results = context.Queue(), context.Queue()
    shared = replace(config, tensor_parallel_size=size)
    processes = [context.Process(target=_lead_alone, args=(size, store, shared, secret, addresses, results))]
    processes[0].start()
    address = addresses.get(timeout=60)
    for rank in range(1, size):
        processes.append(context.Process(target=_follow, args=(rank, size, store, shared, address, secret)))
        processes[-1].start()
    found = results.get(timeout=180)
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * size
    assert [found[str(i)] for i in range(len(PROMPTS))] == expected
