"""Draft workers elsewhere guess as a head beside the target does, and their loss costs speed alone."""

from __future__ import annotations

import dataclasses
import os
import socket
import time

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.draft_link import DraftWorker
from jetflow_cluster.engine.loading import load_draft_worker
from jetflow_cluster.types import RequestOutput
from support.draft_workers import PAGE, PAGES, SECRET, RemoteHeads, kill, wait_for

PROMPTS = [[1, 2, 3], list(range(40, 75)), [7] * 20, [200], list(range(100, 163))]
PARAMS = [
    SamplingParams(
        max_tokens=40,
        seed=i,
        ignore_eos=True,
        temperature=0.8 if i % 2 else 0.0,
        speculation=SpeculationOptions(mode="force", max_tree_nodes=16),
    )
    for i in range(len(PROMPTS))
]


def local(setup: RemoteHeads) -> list[RequestOutput]:
    config = setup.config
    llm = LLM(
        config.model,
        config.draft_head,
        dtype=config.dtype,
        draft_dtype=config.draft_dtype,
        num_pages=PAGES,
        tree_nodes={1: 16},
        context_lookup=False,
    )
    return llm.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize(
    ("num_workers", "dtype", "draft_dtype"),
    # With the draft dtype "auto" a head beside a fp32 target is bf16 where the CPU has that.
    [(1, "float64", "auto"), (2, "float64", "auto"), (2, "float32", "auto"), (1, "float32", "bfloat16")],
)
def test_workers_guess_as_a_local_head_does(setup: RemoteHeads, num_workers: int, dtype: str, draft_dtype: str) -> None:
    setup.config = dataclasses.replace(setup.config, dtype=dtype, draft_dtype=draft_dtype)
    expected = local(setup)
    llm = setup.llm()
    for i in range(num_workers):
        setup.start_worker(f"w{i}")
    wait_for(setup, num_workers)
    found = llm.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.speculation for o in found] == [o.speculation for o in expected]
    assert sum(o.speculation.num_draft_nodes for o in found) > 0


def test_without_workers_nothing_is_speculated_and_nothing_fails(setup: RemoteHeads) -> None:
    expected = local(setup)
    found = setup.llm().generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert sum(o.speculation.num_draft_nodes for o in found) == 0


def test_a_lost_worker_costs_no_token_and_a_sibling_goes_on(setup: RemoteHeads) -> None:
    expected = local(setup)
    llm = setup.llm()
    workers = [setup.start_worker(f"w{i}") for i in range(2)]
    wait_for(setup, 2)
    steps = 0

    def lose_one(_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            kill(workers[0])

    llm.engine.on_step = lose_one
    found = llm.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert setup.drafters[-1].num_workers == 1
    assert setup.drafters[-1].epoch == 0


def test_when_the_last_worker_goes_requests_draft_no_more_and_new_ones_use_the_next(setup: RemoteHeads) -> None:
    expected = local(setup)
    llm = setup.llm()
    worker = setup.start_worker("first")
    wait_for(setup, 1)
    lost_at: list[int] = []

    def lose(record: object) -> None:
        if llm.engine.num_steps == 5:
            kill(worker)
            lost_at.append(llm.engine.num_steps)

    llm.engine.on_step = lose
    found = llm.generate(PROMPTS, PARAMS)
    assert lost_at == [5]
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert setup.drafters[-1].epoch == 1
    llm.engine.on_step = None
    setup.start_worker("second")
    wait_for(setup, 1)
    again = llm.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in again] == [o.token_ids for o in expected]
    assert sum(o.speculation.num_draft_nodes for o in again) > 0


def test_a_worker_that_does_not_answer_is_given_up_at_the_deadline(setup: RemoteHeads) -> None:
    expected = local(setup)
    setup.deadline_s = 0.3
    llm = setup.llm()
    worker = setup.start_worker("slow")
    wait_for(setup, 1)
    worker._do = lambda job: time.sleep(5)  # type: ignore[method-assign]
    started = time.monotonic()
    found = llm.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert setup.drafters[-1].num_workers == 0
    assert time.monotonic() - started < 30


def test_a_newcomer_guesses_from_the_context_of_a_sibling(setup: RemoteHeads) -> None:
    expected = local(setup)
    llm = setup.llm()
    setup.start_worker("first")
    wait_for(setup, 1)
    setup.drafters[-1].pages_in_use = lambda: range(PAGES)

    def join(_: object) -> None:
        if llm.engine.num_steps == 5:
            setup.start_worker("second")

    llm.engine.on_step = join
    found = llm.generate(PROMPTS, PARAMS)
    assert setup.drafters[-1].num_workers == 2
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.speculation for o in found] == [o.speculation for o in expected]


def test_a_worker_of_another_geometry_is_sent_away(setup: RemoteHeads) -> None:
    drafter = load_draft_worker(setup.config, num_pages=PAGES)
    worker = DraftWorker(drafter, page_size=PAGE, name="stranger", described={"num_pages": 7})
    with pytest.raises(ValueError, match="num_pages"):
        worker.connect(setup.listener.address, SECRET)


def test_small_messages_wait_for_no_acknowledgement(setup: RemoteHeads) -> None:
    llm = setup.llm()
    worker = setup.start_worker("w")
    wait_for(setup, 1)
    assert llm.engine.drafter is setup.drafters[-1]
    assert worker._connection is not None
    for connection in (worker._connection, setup.drafters[-1]._links[0]._connection):
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
