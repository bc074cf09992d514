"""Measurements under load: arrivals, bounds, and every kind of system, on small models and servers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from jetflow_cluster.bench.load.arrivals import (
    BURSTY_TRACE,
    BurstProcess,
    poisson_arrivals,
    read_trace,
    trace_arrivals,
    write_trace,
)
from jetflow_cluster.bench.load.bench import LoadBenchConfig, run_engine_load, run_served_load
from jetflow_cluster.bench.load.rounds import LoadPlan
from jetflow_cluster.bench.load.rows import make_rows
from jetflow_cluster.bench.load.stats import paired_ratio
from jetflow_cluster.bench.load.systems import OpenAiLoad, speculation_of
from jetflow_cluster.bench.load.workload import LoadRequest, make_requests
from jetflow_cluster.bench.prompts import BenchPrompt
from jetflow_cluster.console import stderr
from support.api_server import api_server


def test_the_shipped_trace_is_what_its_process_gives(tmp_path: Path) -> None:
    shipped = json.loads(BURSTY_TRACE.read_text())
    assert write_trace(BurstProcess(**shipped["process"]), tmp_path / "trace.json") == shipped
    assert (tmp_path / "trace.json").read_bytes() == BURSTY_TRACE.read_bytes()


def test_bursts_are_burstier_than_poisson() -> None:
    trace = read_trace(BURSTY_TRACE)
    assert trace[0] == 0.0
    assert trace[-1] == pytest.approx(len(trace) - 1, rel=1e-3)

    def spread(moments: list[float]) -> float:
        counts = np.bincount((np.asarray(moments) / 8).astype(int))[:-1]
        return float(counts.var() / counts.mean())

    assert spread(trace) > 2 * spread(poisson_arrivals(len(trace), 1.0, seed=3))


def test_a_trace_is_scaled_and_repeated() -> None:
    assert trace_arrivals([0.0, 1.0, 3.0], 5, per_s=2.0) == pytest.approx([0.0, 0.5, 1.5, 2.25, 2.75])


@pytest.mark.parametrize("content", ["[]", '{"arrivals": []}', '{"arrivals": [1, 0.5]}', '{"arrivals": [-1]}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="trace: "):
        read_trace(tmp_path / "t.json")


def test_bounds_hold_the_median_and_narrow_with_rounds() -> None:
    rng = np.random.default_rng(1)
    noise = np.exp(rng.normal(0.0, 0.1, size=200))
    few, many = (paired_ratio(list(1.1 * noise[:n]), [1.0] * n) for n in (10, 200))
    for found in (few, many):
        assert found.low <= found.median <= found.high
    assert many.high - many.low < few.high - few.low
    assert many.low < 1.1 < many.high
    assert paired_ratio([2.0], [1.0]).low == 2.0
    with pytest.raises(ValueError, match="must be as many"):
        paired_ratio([1.0], [])


def _sample(system: str, index: int, speed: float) -> dict[str, Any]:
    return {
        "loop": "closed", "level": 4, "round": index, "system": system, "seconds": 1.0, "tokens_per_s": speed,
        "request_tokens_per_s": speed / 4, "first_s": 0.1, "first_p95_s": 0.2, "mean_acceptance_length": 2.0,
        "num_requests": 4, "num_same_outputs": 4,
    }  # fmt: skip


def test_rows_compare_within_rounds_and_with_the_best_fixed_budget() -> None:
    speeds = {"off": (100, 50), "auto": (150, 75), "8": (120, 90), "16": (10, 10)}
    samples = [_sample(name, i, values[i]) for name, values in speeds.items() for i in (0, 1)]
    rows = {row["system"]: row for row in make_rows(samples)}
    assert rows["auto"]["ratio_to_off"] == 1.5
    assert rows["auto"]["best_fixed"] == "8"
    assert rows["auto"]["ratio_to_best_fixed"] == pytest.approx((150 / 120 + 75 / 90) / 2, abs=1e-4)
    assert rows["auto"]["ratio_to_transformers"] is None
    assert rows["off"]["ratio_to_off_bounds"] == [1.0, 1.0]


def test_a_round_asks_the_same_of_all() -> None:
    prompts = [BenchPrompt(name=str(i), text="x", token_ids=list(range(i, i + 40))) for i in range(9)]
    common: dict[str, Any] = {"prompt_lengths": (8, 16), "output_lengths": (4, 6), "arrivals": None}
    first, again, other = (make_requests(prompts, 6, seed=seed, **common) for seed in ("a", "a", "b"))
    assert first == again != other
    assert sorted(len(request.prompt.token_ids) for request in first) == [8, 8, 8, 16, 16, 16]
    assert sorted(request.max_tokens for request in first) == [4, 4, 4, 6, 6, 6]


@pytest.mark.parametrize("mode", ["fast", "1", "", "-3"])
def test_unknown_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="modes = "):
        speculation_of(mode)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"loop": "open"}, "loop"),
        ({"loop": "poisson"}, "rates"),
        ({"loop": "trace", "rates": (0.0,)}, "rates"),
        ({"concurrencies": (0,)}, "concurrencies"),
        ({"output_lengths": ()}, "output_lengths"),
        ({"num_rounds": 0}, "num_rounds"),
    ],
)
def test_plans_that_cannot_be_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} = "):
        LoadPlan(**given)


_COHORTS = ("8 nodes, one cohort", "8 nodes, two cohorts")


def _prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n---\n".join(["def f(a):", "for i in range(10):\n    x", "import os", "x = [1, 2"]))
    return path


def test_the_engine_under_load(tiny_target_dir: Path, tiny_head_dir: Path, tmp_path: Path) -> None:
    config = LoadBenchConfig(
        output_dir=tmp_path,
        plan=LoadPlan(concurrencies=(2,), num_rounds=2, num_requests=2, prompt_lengths=(4, 8), output_lengths=(6,)),
        modes=("auto", "off", "4"),
        model=str(tiny_target_dir),
        draft_head=str(tiny_head_dir),
        dtype="float64",
        transformers_at=(2,),
        prompts=_prompts(tmp_path),
    )
    rows = run_engine_load(config, stderr)["rows"]
    assert [row["system"] for row in rows] == ["off", "auto", "4", "transformers"]
    assert all(row["share_same_outputs"] == 1.0 for row in rows)
    assert all(row["ratio_to_off"] > 0 and row["num_rounds"] == 2 for row in rows)
    assert all(0 < row["planning_share"] < 1 for row in rows[:3]) and rows[3]["planning_share"] is None
    assert {file.name for file in tmp_path.iterdir()} >= {"results.json", "load.md", "load.png"}


def test_a_random_head_takes_a_shape(tiny_target_dir: Path, tiny_head_dir: Path, tmp_path: Path) -> None:
    config = LoadBenchConfig(
        output_dir=tmp_path,
        plan=LoadPlan(concurrencies=(2,), num_rounds=1, prompt_lengths=(4,), output_lengths=(6,)),
        modes=("off", "auto", "4"),
        model=str(tiny_target_dir),
        draft_head=str(tiny_head_dir),
        random_head=True,
        dtype="float64",
        num_draft_workers=1,
        prompts=_prompts(tmp_path),
    )
    results = run_engine_load(config, stderr)
    assert results["where"] == "engine, 1 draft workers, random head"
    assert [row["system"] for row in results["rows"]] == ["off", "auto", "4", *_COHORTS]
    assert all(row["share_same_outputs"] == 1.0 for row in results["rows"])
    assert all(row["mean_acceptance_length"] < 1.5 for row in results["rows"][2:])


def test_a_random_head_needs_a_shape(tiny_target_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draft_head = None"):
        run_engine_load(LoadBenchConfig(output_dir=tmp_path, model=str(tiny_target_dir), random_head=True), stderr)


@pytest.mark.parametrize("given", [{"random_head": True}, {"num_draft_workers": 1}, {"transformers_at": (1,)}])
def test_what_a_server_cannot_be_measured_with_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    plan = LoadPlan(output_lengths=(8,))
    with pytest.raises(ValueError, match=f"{next(iter(given))} = "):
        run_served_load(LoadBenchConfig(output_dir=tmp_path, plan=plan, **given), stderr)


@pytest.mark.parametrize("loop", ["closed", "poisson", "trace"])
def test_a_server_under_load(tmp_path: Path, loop: str) -> None:
    plan = LoadPlan(
        loop=loop,
        concurrencies=(3,),
        rates=(200.0,),
        num_rounds=2,
        num_requests=6,
        prompt_lengths=(4, 8),
        output_lengths=(5, 9),
    )
    with api_server() as running:
        config = LoadBenchConfig(
            output_dir=tmp_path, plan=plan, modes=("off", "auto"), server=running.address, prompts=_prompts(tmp_path)
        )
        results = run_served_load(config, stderr)
        added = LoadBenchConfig(
            output_dir=tmp_path,
            plan=LoadPlan(concurrencies=(1,), num_rounds=1, output_lengths=(5,)),
            modes=("off",),
            server=running.address,
            prompts=_prompts(tmp_path),
            add=True,
        )
        both = run_served_load(added, stderr)
    assert [row["system"] for row in results["rows"]] == ["off", "auto"]
    assert all(row["share_same_outputs"] == 1.0 for row in results["rows"])
    assert {row["num_rounds"] for row in results["rows"]} == {2}
    assert len(both["rows"]) == 3
    assert len(both["runs"]) == 2


class _OpenAiServer:
    """Streams so many words as are asked for; counts them when it is asked to."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.counts = True

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if body["max_tokens"] > 100:
            return web.Response(status=400, text="too long")
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for _ in range(body["max_tokens"] // 2):
            await answer.write(b'data: {"choices": [{"text": "two words "}]}\n\n')
            await asyncio.sleep(0.002)
        if self.counts:
            await answer.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % body["max_tokens"])
        await answer.write(b"data: [DONE]\n\n")
        return answer


@pytest.fixture
def openai() -> Iterator[tuple[_OpenAiServer, str]]:
    server, loop, address = _OpenAiServer(), asyncio.new_event_loop(), ""

    async def start() -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/v1/completions", server.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    runner, address = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server, address
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _requests(count: int, max_tokens: int) -> list[LoadRequest]:
    prompt = BenchPrompt(name="p", text="def f(", token_ids=[1, 2])
    return [LoadRequest(prompt=prompt, max_tokens=max_tokens) for _ in range(count)]


def test_no_turn_begins_behind_the_limit(tmp_path: Path) -> None:
    with api_server() as running:
        config = LoadBenchConfig(
            output_dir=tmp_path,
            plan=LoadPlan(concurrencies=(1, 2), num_rounds=3, output_lengths=(5,)),
            modes=("off",),
            server=running.address,
            prompts=_prompts(tmp_path),
            max_s=0.0,
        )
        rows = run_served_load(config, stderr)["rows"]
    assert [(row["level"], row["num_rounds"]) for row in rows] == [(1, 1)]


def test_an_openai_endpoint_under_load(openai: tuple[_OpenAiServer, str]) -> None:
    server, address = openai
    system = OpenAiLoad("other", f"{address}/v1/", "m", "secret", {"ignore_eos": True})
    run = system.run(_requests(5, 8), num_concurrent=2)
    assert [len(outcome.token_ids) for outcome in run.outcomes] == [8] * 5
    assert all(0 < outcome.first_s < outcome.took_s < run.seconds for outcome in run.outcomes)
    assert server.keys == ["Bearer secret"] * 5
    body = server.bodies[0]
    assert (body["prompt"], body["model"], body["ignore_eos"], body["stream"]) == ("def f(", "m", True, True)
    server.counts = False
    # Without usage, each chunk counts as a token.
    assert [len(outcome.token_ids) for outcome in system.run(_requests(1, 8), 1).outcomes] == [4]


def test_an_endpoint_that_refuses_ends_the_measurement(openai: tuple[_OpenAiServer, str]) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        OpenAiLoad("other", openai[1], "m", None, {}).run(_requests(1, 200), 1)
    assert "HTTP 400: too long" in str(caught.value.exceptions[0])


def test_an_endpoint_is_measured_beside_a_server(openai: tuple[_OpenAiServer, str], tmp_path: Path) -> None:
    with api_server() as running:
        config = LoadBenchConfig(
            output_dir=tmp_path,
            plan=LoadPlan(concurrencies=(2,), num_rounds=2, output_lengths=(6,)),
            modes=("off",),
            server=running.address,
            openai=openai[1],
            prompts=_prompts(tmp_path),
        )
        rows = run_served_load(config, stderr)["rows"]
    assert [row["system"] for row in rows] == ["off", "openai"]
    assert rows[1]["ratio_to_off"] > 0
