"""The loop's thread: what it reports, when commands take effect, and what becomes of faults."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.cluster.replica.step_loop import StepLoop
from jetflow_cluster.cluster.replica.ticket import LoopReport, LoopState, NotServingError, Ticket
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.protocols import EngineLostError
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import FinishReason

WAIT_S = 120.0
PROMPTS = [[1, 2, 3], [70] * 30, [9], [20, 30, 40, 50, 60]]
STAGES = ["schedule", "draft", "build", "verify", "accept", "commit"]


def _params(**given: Any) -> SamplingParams:
    speculation = SpeculationOptions(mode="force", max_tree_nodes=8)
    return SamplingParams(**({"max_tokens": 20, "temperature": 0.0, "speculation": speculation} | given))


class Reports:
    """Everything that a loop told."""

    def __init__(self) -> None:
        self.all: list[LoopReport] = []
        self._changed = threading.Condition()

    def __call__(self, report: LoopReport) -> None:
        with self._changed:
            self.all.append(report)
            self._changed.notify_all()

    def wait(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(holds, WAIT_S)

    def tokens(self, ticket: Ticket) -> list[int]:
        return [t for r in self.all for u in r.updates if u.ticket is ticket for t in u.delta.token_ids]

    def reason(self, ticket: Ticket) -> FinishReason | None:
        reasons = [u.delta.finish_reason for r in self.all for u in r.updates if u.ticket is ticket]
        assert all(reason is None for reason in reasons[:-1])
        return reasons[-1] if reasons else None

    def wait_for_end(self, *tickets: Ticket) -> None:
        self.wait(lambda: all(self.reason(ticket) is not None for ticket in tickets))


class Running:
    def __init__(self, frontend: EngineFrontend, **options: Any):
        self.frontend, self.reports = frontend, Reports()
        self.loop = StepLoop(frontend.engine, self.reports, **options)
        self._count = 0

    def submit(self, prompt: list[int], params: SamplingParams, owner: str = "a") -> Ticket:
        self._count += 1
        return self.loop.submit(self.frontend.make_request(f"r{self._count}", prompt, params), owner=owner)


@contextmanager
def running(frontend: EngineFrontend, **options: Any) -> Iterator[Running]:
    made = Running(frontend, **options)
    made.loop.start()
    try:
        yield made
    finally:
        assert made.loop.stop(WAIT_S)


@contextmanager
def held_step(frontend: EngineFrontend) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The next pass of the target waits: the first event tells that it began, the second lets it go on."""
    target = frontend.engine.target
    begun, go_on = threading.Event(), threading.Event()
    verify = target.verify

    def wait_and_verify(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(WAIT_S)
        return verify(*args)

    target.verify = wait_and_verify  # type: ignore[method-assign]
    try:
        yield begun, go_on
    finally:
        go_on.set()
        target.verify = verify  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 3, "top_p": 0.9}, id="sampled"),
        pytest.param({"prior_output_token_ids": [5, 6, 7]}, id="resumed"),
    ],
)
def test_tokens_are_those_of_the_engine(frontend: EngineFrontend, local: LLM, given: dict[str, Any]) -> None:
    expected = [output.token_ids for output in local.generate(PROMPTS, _params(**given))]
    with running(frontend) as run:
        tickets = [run.submit(prompt, _params(**given)) for prompt in PROMPTS]
        run.reports.wait_for_end(*tickets)
    prior = given.get("prior_output_token_ids", [])
    assert [prior + run.reports.tokens(ticket) for ticket in tickets] == expected
    steps = [report.step for report in run.reports.all if report.updates]
    assert steps == sorted(set(steps)), "one report for each step"


def test_idle_costs_nothing(frontend: EngineFrontend) -> None:
    with running(frontend) as run:
        run.reports.wait_for_end(run.submit([1, 2], _params()))
        clock = time.pthread_getcpuclockid(run.loop._thread.ident or 0)
        before = time.clock_gettime(clock)
        time.sleep(1.0)
        assert time.clock_gettime(clock) - before < 0.01
        assert run.loop.step_age_s == 0.0


def test_aborts_take_effect_within_the_step_that_is_computed(frontend: EngineFrontend) -> None:
    with running(frontend) as run, held_step(frontend) as (begun, go_on):
        ticket = run.submit([1, 2, 3], _params(max_tokens=400, ignore_eos=True))
        assert begun.wait(WAIT_S)
        assert run.loop.step_age_s > 0.0
        run.loop.abort([ticket.key, "unknown"])
        go_on.set()
        run.reports.wait_for_end(ticket)
        assert run.reports.reason(ticket) is FinishReason.ABORT
        assert run.reports.tokens(ticket) == [], "what the step that was running chose is nobody's"
        run.loop.abort([ticket.key])


def test_an_owner_is_aborted_alone(frontend: EngineFrontend) -> None:
    with running(frontend) as run, held_step(frontend) as (begun, go_on):
        tickets = [run.submit([i], _params(ignore_eos=True), owner="ab"[i % 2]) for i in range(6)]
        assert begun.wait(WAIT_S)
        run.loop.abort_owner("a")
        go_on.set()
        run.reports.wait_for_end(*tickets)
        reasons = {(ticket.owner, run.reports.reason(ticket)) for ticket in tickets}
    assert reasons == {("a", FinishReason.ABORT), ("b", FinishReason.LENGTH)}


def test_a_failed_step_ends_its_requests_and_no_others(frontend: EngineFrontend) -> None:
    target = frontend.engine.target
    verify = target.verify

    def fail_once(*args: Any) -> Any:
        target.verify = verify  # type: ignore[method-assign]
        raise MemoryError("no memory")

    with running(frontend) as run:
        target.verify = fail_once  # type: ignore[method-assign]
        failed = run.submit([1, 2], _params())
        run.reports.wait_for_end(failed)
        after = run.submit([1, 2], _params())
        run.reports.wait_for_end(after)
        assert run.loop.state is LoopState.RUNNING
    assert run.reports.reason(failed) is FinishReason.ERROR
    assert run.reports.reason(after) in (FinishReason.LENGTH, FinishReason.STOP)


def test_a_request_that_cannot_be_queued_ends_alone(
    frontend: EngineFrontend, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = frontend.engine.add

    def add_good(request: Request) -> None:
        if request.request_id == "bad":
            raise RuntimeError("no room in the queue")
        add(request)

    monkeypatch.setattr(frontend.engine, "add", add_good)
    with running(frontend) as run:
        request = frontend.make_request("bad", [1, 2], _params())
        bad = run.loop.submit(request, owner="a")
        good = run.submit([1, 2], _params())
        run.reports.wait_for_end(bad, good)
    assert run.reports.reason(bad) is FinishReason.ERROR
    assert run.reports.reason(good) is not FinishReason.ERROR
    assert len([r for r in caplog.records if "bad" in r.getMessage()]) == 1


def _out_of_step(*args: Any) -> Any:
    try:
        raise ConnectionError("rank 1 is gone")
    except ConnectionError as error:
        raise EngineLostError("ranks are out of step") from error


def _out_of_memory(*args: Any) -> Any:
    raise MemoryError("no memory at all")


@pytest.mark.parametrize(
    "part, fault, max_failed, root",
    [
        pytest.param("target.verify", _out_of_step, 8, "rank 1 is gone", id="ranks-out-of-step"),
        pytest.param("scheduler.schedule", _out_of_memory, 8, "no memory at all", id="outside-of-a-batch"),
        pytest.param("target.verify", _out_of_memory, 2, "no memory at all", id="one-step-after-the-other"),
    ],
)
def test_a_lost_engine(make_frontend: Any, caplog: Any, part: str, fault: Any, max_failed: int, root: str) -> None:
    frontend = make_frontend()
    owner, name = part.split(".")
    setattr(getattr(frontend.engine, owner), name, fault)
    with running(frontend, max_failed_steps=max_failed) as run, caplog.at_level(logging.CRITICAL):
        tickets = []
        while run.loop.state is LoopState.RUNNING:
            try:
                tickets.append(run.submit([1, 2], _params()))
                run.reports.wait_for_end(*tickets)
            except NotServingError:
                break
        run.reports.wait(lambda: run.reports.all[-1].state is LoopState.FAILED)
        assert {run.reports.reason(ticket) for ticket in tickets} == {FinishReason.ERROR}
        assert run.loop.failure is not None
        with pytest.raises(NotServingError) as refused:
            run.submit([3], _params())
        assert refused.value.state is LoopState.FAILED
        assert run.loop.drain().result(WAIT_S) is None
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(logged) == 1
    assert root in logged[0]
    assert len(tickets) <= max_failed + 1


def test_drain_finishes_what_runs(frontend: EngineFrontend) -> None:
    with running(frontend) as run:
        tickets = [run.submit(prompt, _params()) for prompt in PROMPTS]
        drained = run.loop.drain()
        with pytest.raises(NotServingError) as refused:
            run.submit([1], _params())
        assert refused.value.state is LoopState.DRAINING
        drained.result(WAIT_S)
        assert all(run.reports.reason(t) in (FinishReason.LENGTH, FinishReason.STOP) for t in tickets)
        assert run.loop.drain().result(WAIT_S) is None, "at once"


def test_stop_aborts_what_runs(frontend: EngineFrontend) -> None:
    with running(frontend) as run:
        tickets = [run.submit([1, 2], _params(max_tokens=400, ignore_eos=True)) for _ in range(20)]
        ended = run.submit([1, 2], _params(prior_output_token_ids=[4, 256]))
        assert run.loop.stop(WAIT_S)
        assert {run.reports.reason(ticket) for ticket in tickets} == {FinishReason.ABORT}
        assert run.reports.reason(ended) in (FinishReason.STOP, FinishReason.ABORT)
        assert run.reports.all[-1].state is LoopState.STOPPED
        assert not [thread for thread in threading.enumerate() if thread.name == "jetflow-step-loop"]
        with pytest.raises(NotServingError):
            run.submit([1], _params())
        assert run.loop.drain().done()


def test_stop_does_not_wait_for_ever(frontend: EngineFrontend) -> None:
    with running(frontend) as run, held_step(frontend) as (begun, go_on):
        run.submit([1, 2], _params())
        assert begun.wait(WAIT_S)
        assert not run.loop.stop(0.01)
        go_on.set()
        assert run.loop.stop(WAIT_S)


def test_a_sink_that_fails_ends_the_loop(make_frontend: Any) -> None:
    frontend = make_frontend()

    def gone(report: LoopReport) -> None:
        raise RuntimeError("Event loop is closed")

    loop = StepLoop(frontend.engine, gone)
    loop.start()
    loop.submit(frontend.make_request("a", [1], _params()), owner="a")
    assert loop.drain().result(WAIT_S) is None
    assert str(loop.failure) == "Event loop is closed"
    assert loop.stop(WAIT_S)


def test_load_and_timing(frontend: EngineFrontend) -> None:
    with running(frontend) as run, held_step(frontend) as (begun, go_on):
        first = run.submit([1, 2, 3], _params(max_tokens=30, ignore_eos=True))
        assert begun.wait(WAIT_S)
        # One more than may run at once, and one of which some tokens came before.
        others = [run.submit([i], _params(max_tokens=2, ignore_eos=True)) for i in range(16)]
        resumed = run.submit([7] * 500, _params(max_tokens=40, prior_output_token_ids=[1, 2], ignore_eos=True))
        assert run.loop.load().outstanding_tokens == 33
        go_on.set()
        run.reports.wait_for_end(first, *others, resumed)
        load = run.loop.load()
    assert load.outstanding_tokens == 0
    assert load.tokens_per_s > 0
    assert load.mean_acceptance_length >= 1.0
    for ticket in [first, *others, resumed]:
        moments = [ticket.arrived_s, ticket.scheduled_s, ticket.first_token_s, ticket.ended_s]
        assert None not in moments
        assert moments == sorted(moments)  # type: ignore[type-var]
    assert len(run.reports.tokens(resumed)) == 10, "up to the longest sequence"


def test_trace_tells_the_stages_of_each_step(frontend: EngineFrontend) -> None:
    with running(frontend, num_trace_slots=600) as run:
        began_us = time.time() * 1e6
        run.reports.wait_for_end(run.submit([1, 2, 3], _params(ignore_eos=True)))
        run.loop.drain().result(WAIT_S)
        events = run.loop.trace(3600.0)
        assert run.loop.trace(0.0) == []
    by_step: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        by_step.setdefault(event["args"]["step"], []).append(event)
    assert len(by_step) > 1
    for stages in by_step.values():
        assert [stage["name"] for stage in stages] == STAGES
        for stage, following in pairwise(stages):
            assert stage["ts"] + stage["dur"] == pytest.approx(following["ts"], abs=1.0)
    assert all(event["ph"] == "X" and event["ts"] > began_us - 1e6 and event["dur"] >= 0 for event in events)


def test_trace_keeps_the_last_stages(frontend: EngineFrontend) -> None:
    with running(frontend, num_trace_slots=10) as run:
        run.reports.wait_for_end(run.submit([1, 2, 3], _params(max_tokens=60, ignore_eos=True)))
        run.loop.drain().result(WAIT_S)
        events = run.loop.trace(3600.0)
    assert len(events) == 10
    assert events[-1]["name"] == "commit"
