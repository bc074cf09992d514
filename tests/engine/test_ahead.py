"""Work for the next step while one is computed: it changes no token, whoever ends, comes or goes meanwhile."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.protocols import StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.staging import Staging
from jetflow_cluster.types import FinishReason, RequestDelta
from support.static_engines import make_static

#: So few pages that requests are preempted.
OPTIONS: dict[str, Any] = {
    "dtype": "float64",
    "draft_dtype": "float64",
    "page_size": 5,
    "num_pages": 16,
    "max_num_requests": 5,
    "max_num_batched_tokens": 96,
    "tree_nodes": {1: 9, 4: 5},
}
NUM_REQUESTS = 12


def make_llm(folders: tuple[Path, Path], kind: str) -> LLM:
    llm = LLM(str(folders[0]), str(folders[1]), **OPTIONS)
    if kind == "static":
        make_static(llm, max_len=64)
    return llm


def requests_of(llm: LLM, seed: int) -> list[Request]:
    rng, made = random.Random(seed), []
    for i in range(NUM_REQUESTS):
        options = SpeculationOptions(
            mode=rng.choice(["auto", "auto", "force", "off"]), max_tree_nodes=rng.choice([None, 4])
        )
        params = SamplingParams(
            max_tokens=rng.choice([1, 3, 20, 24]),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice([(), (17, 60, 61)]),
            repetition_penalty=1.2 if i == 7 else 1.0,
            speculation=options,
        )
        made.append(llm.frontend.make_request(f"r{i}", [rng.randrange(256) for _ in range(rng.randint(1, 25))], params))
    return made


def run(llm: LLM, seed: int, *, is_disturbed: bool) -> list[Request]:
    """Requests come in between steps and, where it is disturbed, within them, and some are aborted."""
    engine, rng = llm.engine, random.Random(seed)
    requests = requests_of(llm, seed)
    waiting, told = list(requests), []

    def disturb() -> None:
        if waiting and rng.random() < 0.4:
            engine.add(waiting.pop(0))
        if engine.requests and rng.random() < 0.12:
            chosen = rng.choice(list(engine.requests))
            delta = engine.abort(chosen)
            assert delta is not None and delta.finish_reason is FinishReason.ABORT
            assert engine.abort(chosen) is None, "it has ended"
            told.append(delta)

    if is_disturbed:
        engine.while_computing = disturb
    while waiting or engine.has_work:
        if waiting and (rng.random() < 0.8 or not engine.has_work):
            engine.add(waiting.pop(0))
        told += engine.step()
        if is_disturbed:
            disturb()
        engine.pool.check()
    engine.while_computing = lambda: None
    check_told(requests, told)
    return requests


def check_told(requests: list[Request], told: list[RequestDelta]) -> None:
    for request in requests:
        deltas = [delta for delta in told if delta.request_id == request.request_id]
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert tokens == request.token_ids[len(request.prompt_token_ids) :]
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [request.finish_reason]
        assert deltas[-1].finish_reason, "nothing is told behind the end"


@pytest.mark.parametrize("kind", ["eager", "static"])
def test_no_token_depends_on_it(tiny_target_dir: Path, tiny_head_dir: Path, kind: str) -> None:
    folders = (tiny_target_dir, tiny_head_dir)
    plain, ahead = make_llm(folders, kind), make_llm(folders, kind)
    plain.engine.scheduler.prepare = lambda plan: None
    num_served = num_aborted = 0
    schedule = ahead.engine.scheduler.schedule

    def count() -> StepPlan:
        nonlocal num_served
        prepared = ahead.engine.scheduler._ahead
        plan = schedule()
        if prepared is not None:
            num_served += any(item is own for item in plan.items for own in prepared.items.values())
        return plan

    ahead.engine.scheduler.schedule = count
    for seed in range(2):
        expected = run(plain, seed, is_disturbed=False)
        for is_disturbed in (False, True):
            found = run(ahead, seed, is_disturbed=is_disturbed)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.error is None and theirs.error is None
                if is_disturbed and ours.finish_reason is FinishReason.ABORT:
                    num_aborted += 1
                    assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
                else:
                    assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
    for llm in (plain, ahead):
        stats = llm.stats()
        assert stats.num_used_pages == 0
        assert stats.num_preemptions > 0
    assert num_served > 8
    assert num_aborted > 3


def test_one_wait_per_step_behind_the_work(
    tiny_target_dir: Path, tiny_head_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(tiny_target_dir), str(tiny_head_dir), **OPTIONS | {"num_pages": 200})
    runner = make_static(llm, max_len=64)
    events: list[str] = []

    def noted(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def note(*args: Any) -> Any:
            events.append(name)
            return call(*args)

        monkeypatch.setattr(owner, name, note)

    for name in ("upload", "begin_download", "wait"):
        noted(Staging, name)
    noted(llm.engine.scheduler, "prepare")
    for request in requests_of(llm, 1):
        llm.engine.add(request)
    while llm.engine.has_work:
        before, num_before = len(events), runner.num_static_steps + runner.num_mixed_steps
        llm.engine.step()
        if runner.num_static_steps + runner.num_mixed_steps > num_before:
            assert [e for e in events[before:] if e != "upload"] == ["begin_download", "prepare", "wait"]
    assert runner.num_static_steps > 5
    assert runner.num_mixed_steps > 1


def test_a_step_that_fails_in_flight_ends_its_requests_once(tiny_target_dir: Path, tiny_head_dir: Path) -> None:
    llm = make_llm((tiny_target_dir, tiny_head_dir), "eager")
    engine = llm.engine
    requests = [llm.frontend.make_request(f"r{i}", [3 + i] * 4, SamplingParams(max_tokens=9)) for i in range(2)]
    for request in requests:
        engine.add(request)
    engine.step()
    told: list[RequestDelta | None] = []

    def abort_and_fail() -> None:
        told.append(engine.abort("r0"))
        assert [request.request_id for request in engine.requests.values()] == ["r1"]
        raise RuntimeError("thrown into the step")

    engine.while_computing = abort_and_fail
    told += engine.step()
    reasons = [(delta.request_id, delta.finish_reason) for delta in told if delta]
    assert reasons == [("r0", FinishReason.ABORT), ("r1", FinishReason.ERROR)]
    assert not engine.has_work
    assert llm.stats().num_used_pages == 0


def test_there_is_work_until_pages_are_free(tiny_target_dir: Path, tiny_head_dir: Path) -> None:
    llm = make_llm((tiny_target_dir, tiny_head_dir), "eager")
    engine = llm.engine
    engine.add(llm.frontend.make_request("r0", list(range(20)), SamplingParams(max_tokens=20, ignore_eos=True)))
    seen = []

    def abort() -> None:
        assert engine.abort("r0") is not None
        seen.append((engine.has_work, engine.stats().num_used_pages > 0))

    engine.while_computing = abort
    engine.step()
    assert seen == [(True, True)]
    assert (engine.has_work, engine.stats().num_used_pages) == (False, 0)


def test_pages_of_an_earlier_request_of_the_same_name_are_forgotten(tiny_target_dir: Path, tiny_head_dir: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    found = []
    for kind in ("eager", "static"):
        llm = make_llm((tiny_target_dir, tiny_head_dir), kind)
        for prompt in ([9, 8, 7], [40, 41, 42, 43]):
            request = llm.frontend.make_request("same", prompt, params)
            llm.engine.add(request)
            while request.finish_reason is None:
                llm.engine.step()
            found.append(request.token_ids)
            # The next one gets others.
            llm.engine.pool.allocate(2)
    assert found[:2] == found[2:]
