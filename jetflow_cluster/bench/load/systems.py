"""What is put under load: this engine in the process, a server over gRPC, an OpenAI endpoint, `transformers`."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import aiohttp

from jetflow_cluster.bench.load.workload import LoadRequest, LoadRun, Outcome
from jetflow_cluster.bench.systems import TransformersSystem
from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

#: Seconds for one request over a network.
_TIMEOUT_S = 600.0
#: What lies between an engine's steps.
_BETWEEN = "between"


class LoadSystem(Protocol):
    """Completes the requests of a round greedily."""

    name: str

    def run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        """One timed round; `num_concurrent` bounds what runs at a time in a closed loop, and nothing in an open one."""


def speculation_of(mode: str) -> SpeculationOptions:
    """``auto``, ``off``, or a number of nodes per tree.

    Raises:
        ValueError: it is none of these.
    """
    if mode in (SpeculationMode.AUTO, SpeculationMode.OFF):
        return SpeculationOptions(mode=SpeculationMode(mode))
    if not mode.isdigit() or int(mode) < 2:
        raise ValueError(f"modes = {mode!r}: must be auto, off, or a number of nodes of at least 2")
    return SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=int(mode))


def _params(request: LoadRequest, speculation: SpeculationOptions) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, speculation=speculation)


class EngineLoad:
    """The engine alone, in this process: no network, and a closed loop only."""

    def __init__(self, mode: str, llm: LLM):
        self.name = mode
        self._llm, self._speculation = llm, speculation_of(mode)

    def run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        """See `LoadSystem`; the next request is added as one ends."""
        engine, make = self._llm.engine, self._llm.frontend.make_request
        made = [
            make(f"load-{i}", request.prompt.token_ids, _params(request, self._speculation))
            for i, request in enumerate(requests)
        ]
        arrived, ended = ({request.request_id: 0.0 for request in made} for _ in range(2))
        emitted: dict[str, list[tuple[float, float]]] = {request.request_id: [] for request in made}
        waiting, num_running = deque(made), 0
        stages = _Stages()
        unwatched, engine.on_stage = engine.on_stage, stages.begin
        began = time.perf_counter()
        try:
            while waiting or num_running:
                while waiting and num_running < num_concurrent:
                    request = waiting.popleft()
                    arrived[request.request_id] = time.perf_counter()
                    engine.add(request)
                    num_running += 1
                deltas = engine.step()
                stages.begin(_BETWEEN)
                now = time.perf_counter()
                for delta in deltas:
                    emitted[delta.request_id].append((now - began, len(delta.token_ids)))
                    if delta.finish_reason is not None:
                        ended[delta.request_id] = now
                        num_running -= 1
        finally:
            engine.on_stage = unwatched
            for request in made:
                engine.abort(request.request_id)
        seconds = time.perf_counter() - began
        outcomes = []
        for request in made:
            name, output = request.request_id, request.output()
            if request.error is not None:
                raise RuntimeError(f"{name}: a step failed") from request.error
            outcomes.append(
                Outcome(
                    token_ids=tuple(output.token_ids),
                    first_s=began + emitted[name][0][0] - arrived[name],
                    took_s=ended[name] - arrived[name],
                    emitted=tuple(emitted[name]),
                    num_steps=output.speculation.num_steps,
                    num_accepted=output.speculation.num_accepted_tokens,
                )
            )
        return LoadRun(
            seconds=seconds,
            outcomes=tuple(outcomes),
            num_concurrent=num_concurrent,
            planning_share=stages.share("schedule", "build"),
        )


class CohortLoad(EngineLoad):
    """Trees of one size beside draft workers, which guess for all requests before they are verified, or for one half
    while the other is."""

    def __init__(self, num_nodes: int, num_cohorts: int, llm: LLM):
        super().__init__("auto", llm)
        self.name = f"{num_nodes} nodes, {'two cohorts' if num_cohorts == 2 else 'one cohort'}"
        self._budget = FixedBudget(num_nodes)
        self._budget.has_cohorts = num_cohorts == 2

    def run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        """See `LoadSystem`."""
        scheduler = self._llm.engine.scheduler
        chosen, scheduler.budget = scheduler.budget, self._budget
        try:
            return super().run(requests, num_concurrent)
        finally:
            scheduler.budget = chosen


class _Stages:
    """Seconds of an engine's stages."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._name, self._began = _BETWEEN, time.perf_counter()

    def begin(self, name: str) -> None:
        """A stage begins, and with it the one before ends."""
        now = time.perf_counter()
        self._seconds[self._name] += now - self._began
        self._name, self._began = name, now

    def share(self, *names: str) -> float:
        """Of these in all steps."""
        total = sum(seconds for name, seconds in self._seconds.items() if name != _BETWEEN)
        return sum(self._seconds[name] for name in names) / total


class TransformersLoad:
    """Batched `transformers`: all requests at once, all of one output length."""

    name = "transformers"

    def __init__(self, model: Any):
        self._system = TransformersSystem("transformers", model)

    def run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        """See `LoadSystem`; batches of `num_concurrent`, one after the other."""
        seconds = 0.0
        outcomes: list[Outcome] = []
        for i in range(0, len(requests), num_concurrent):
            batch = requests[i : i + num_concurrent]
            lengths = {request.max_tokens for request in batch}
            if len(lengths) > 1:
                raise ValueError(f"output_lengths = {sorted(lengths)}: transformers completes batches of one length")
            run = self._system.run([request.prompt.token_ids for request in batch], lengths.pop())
            seconds += run.seconds
            outcomes += [
                Outcome(
                    token_ids=tuple(ids),
                    first_s=0.0,
                    took_s=run.seconds,
                    emitted=((seconds, len(ids)),),
                    num_steps=len(ids) - 1,
                )
                for ids in run.token_ids
            ]
        return LoadRun(seconds=seconds, outcomes=tuple(outcomes), num_concurrent=num_concurrent)


class _NetworkLoad(ABC):
    """Sends requests when they are due: in a closed loop as others end, in an open one at their moments."""

    name: str

    def run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        """See `LoadSystem`."""
        return asyncio.run(self._run(requests, num_concurrent))

    @abstractmethod
    async def _run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        """One run, on its own event loop."""


async def _send_all(
    requests: Sequence[LoadRequest], num_concurrent: int, send: Callable[[LoadRequest, float], Awaitable[Outcome]]
) -> LoadRun:
    began = time.perf_counter()
    room = asyncio.Semaphore(num_concurrent)
    is_closed = all(request.arrives_s is None for request in requests)

    async def one(request: LoadRequest) -> Outcome:
        if request.arrives_s is not None:
            await asyncio.sleep(max(0.0, began + request.arrives_s - time.perf_counter()))
            return await send(request, began)
        async with room:
            return await send(request, began)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(request)) for request in requests]
    return LoadRun(
        seconds=time.perf_counter() - began,
        outcomes=tuple(task.result() for task in tasks),
        num_concurrent=num_concurrent if is_closed else None,
    )


class GrpcLoad(_NetworkLoad):
    """A server of this project."""

    def __init__(self, mode: str, address: str):
        self.name = mode
        self._address, self._speculation = address, speculation_of(mode)

    async def _run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        async with AsyncJetFlowClient(self._address, timeout_s=_TIMEOUT_S) as client:

            async def send(request: LoadRequest, round_began: float) -> Outcome:
                began, first = time.perf_counter(), 0.0
                token_ids: list[int] = []
                emitted = []
                stream = client.stream(request.prompt.token_ids, _params(request, self._speculation))
                async for delta in stream:
                    now = time.perf_counter()
                    first = first or now
                    token_ids += delta.token_ids
                    emitted.append((now - round_began, len(delta.token_ids)))
                stats = stream.output.speculation
                return Outcome(
                    token_ids=tuple(token_ids),
                    first_s=(first or time.perf_counter()) - began,
                    took_s=time.perf_counter() - began,
                    emitted=tuple(emitted),
                    num_steps=stats.num_steps,
                    num_accepted=stats.num_accepted_tokens,
                )

            return await _send_all(requests, num_concurrent, send)


class OpenAiLoad(_NetworkLoad):
    """Any endpoint with OpenAI's ``/v1/completions``, streamed; texts go in, so tokens are counted by the server.

    Args:
        name: in the results.
        url: of the server, with or without ``/v1``.
        model: its name there.
        api_key: sent as a bearer token; None sends none.
        options: further fields of the request's body.
    """

    def __init__(self, name: str, url: str, model: str, api_key: str | None, options: dict[str, Any]):
        self.name = name
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/completions"
        self._model, self._options = model, options
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def _run(self, requests: Sequence[LoadRequest], num_concurrent: int) -> LoadRun:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector) as session:

            async def send(request: LoadRequest, round_began: float) -> Outcome:
                return await self._send(session, request, round_began)

            return await _send_all(requests, num_concurrent, send)

    async def _send(self, session: aiohttp.ClientSession, request: LoadRequest, round_began: float) -> Outcome:
        body = {
            "model": self._model,
            "prompt": request.prompt.text,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        began, num_tokens = time.perf_counter(), None
        chunks: list[float] = []
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self._url}: HTTP {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                data = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if chunk.get("choices") and chunk["choices"][0].get("text"):
                    chunks.append(time.perf_counter() - round_began)
                if chunk.get("usage"):
                    num_tokens = int(chunk["usage"]["completion_tokens"])
        took_s = time.perf_counter() - began
        if num_tokens is None:
            # A server that does not count says one chunk per token.
            num_tokens = len(chunks)
        first_s = round_began + chunks[0] - began if chunks else took_s
        # Chunks do not tell how many tokens they hold: each counts as an equal share.
        emitted = tuple((at_s, num_tokens / len(chunks)) for at_s in chunks)
        return Outcome(token_ids=(-1,) * num_tokens, first_s=first_s, took_s=took_s, emitted=emitted)
