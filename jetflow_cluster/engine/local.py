"""`LLM` and `AsyncLLM`: the engine inside the caller's process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend, Prompt
from jetflow_cluster.engine.loading import DrafterFactory
from jetflow_cluster.engine.protocols import TreeBuilder
from jetflow_cluster.engine.request import Request
from jetflow_cluster.env import read_environment
from jetflow_cluster.layers.compute_threads import limit_compute_threads
from jetflow_cluster.types import (
    EngineStats,
    FinishReason,
    InvalidRequestError,
    RequestDelta,
    RequestOutput,
    SamplingParams,
)

_log = logging.getLogger(__name__)


class LLM:
    """Batch generation: give prompts, get finished outputs.

    Args:
        model: target checkpoint (directory or Hugging Face id); None is the embedded default.
        draft_head: draft head checkpoint; None is the embedded one for the embedded target, else no speculation.
        tree_nodes: ``{running requests: nodes per tree}`` for mode ``auto``; None measures it now.
        drafter_factory: replaces the draft head by another source of guesses.
        tree_builder: replaces the exact trees.
        options: the other fields of `EngineConfig`.

    Raises:
        ValueError: a field is out of range, or head and target do not fit.
        FileNotFoundError: a checkpoint is not there.
    """

    def __init__(
        self,
        model: str | None = None,
        draft_head: str | None = None,
        *,
        tree_nodes: Mapping[int, int] | None = None,
        drafter_factory: DrafterFactory | None = None,
        tree_builder: TreeBuilder | None = None,
        **options: Any,
    ):
        config = EngineConfig(model=_text(model), draft_head=_text(draft_head), **options)
        if read_environment().num_threads is None:
            limit_compute_threads()
        self.frontend = EngineFrontend(
            config, tree_nodes=tree_nodes, drafter_factory=drafter_factory, tree_builder=tree_builder
        )
        self._ids = itertools.count()

    @property
    def engine(self) -> Any:
        """The engine, for tracing and tests."""
        return self.frontend.engine

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`, or None."""
        return self.frontend.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output."""
        return self.frontend.max_model_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_delta: Callable[[RequestDelta], None] | None = None,
    ) -> list[RequestOutput]:
        """Completes all prompts in one batch.

        Args:
            prompts: one prompt or several; a prompt is text or token ids.
            params: one for all, or one per prompt; None is `SamplingParams()`.
            on_delta: called with every delta as it comes.

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequestError: before anything runs, when one of them cannot be honoured.
            RuntimeError: a step failed; its cause is the failure.
        """
        several = _prompt_list(prompts)
        per_prompt = _params_list(params, len(several))
        if on_delta is None:
            for one in per_prompt:
                one.speculation.refuse_trees()
        requests = [self._make(p, s) for p, s in zip(several, per_prompt, strict=True)]
        self._run(requests, on_delta)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestDelta]:
        """Yields the deltas of one request as its steps end. Closing the iterator aborts the request."""
        request = self._make(prompt, params or SamplingParams())
        engine = self.frontend.engine
        engine.add(request)
        is_done = False
        try:
            while not is_done:
                for delta in engine.step():
                    if delta.request_id == request.request_id:
                        _raise_failed(request)
                        is_done = delta.finish_reason is not None
                        yield delta
        finally:
            engine.abort(request.request_id)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation; see `EngineFrontend.apply_chat_template`."""
        return self.frontend.apply_chat_template(messages)

    def stats(self) -> EngineStats:
        """Counters of the engine at this moment."""
        return self.frontend.engine.stats()

    def _make(self, prompt: Prompt, params: SamplingParams) -> Request:
        return self.frontend.make_request(f"request-{next(self._ids)}", prompt, params)

    def _run(self, requests: list[Request], on_delta: Callable[[RequestDelta], None] | None) -> None:
        engine = self.frontend.engine
        try:
            for request in requests:
                engine.add(request)
            while engine.has_work:
                for delta in engine.step():
                    if on_delta is not None:
                        on_delta(delta)
        finally:
            for request in requests:
                engine.abort(request.request_id)
        for request in requests:
            _raise_failed(request)


class AsyncLLM:
    """Streaming generation for asyncio programs; the engine steps in a thread of its own.

    The arguments are those of `LLM`. Call `shutdown` at the end, or use it as an async context manager.
    """

    def __init__(self, model: str | None = None, draft_head: str | None = None, **options: Any):
        self._llm = LLM(model, draft_head, **options)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Callable[[RequestDelta | BaseException], None]] = {}
        self._ids = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="jetflow-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`, or None."""
        return self._llm.tokenizer

    @property
    def engine(self) -> Any:
        """The engine, for tracing and tests; the thread owns its state."""
        return self._llm.engine

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestDelta]:
        """Yields the deltas of one request; leaving the loop early aborts it.

        Raises:
            InvalidRequestError: the request cannot be honoured.
            RuntimeError: a step failed, or the engine was shut down.
        """
        if self._closed:
            raise RuntimeError("the engine was shut down")
        name = request_id if request_id is not None else f"async-{next(self._ids)}"
        if name in self._sinks:
            raise InvalidRequestError("request_id", name, "already in use")
        request = self._llm.frontend.make_request(name, prompt, params or SamplingParams())
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[RequestDelta | BaseException] = asyncio.Queue()
        self._sinks[name] = lambda item: _deliver(loop, deltas, item)
        self._inbox.put(lambda: self._add(request))
        try:
            while True:
                item = await deltas.get()
                if isinstance(item, BaseException):
                    raise item
                _raise_failed(request)
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._sinks.pop(name, None)
            if request.finish_reason is None:
                self._inbox.put(lambda: self._abort(name))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last delta with reason ``abort``. Unknown ids are ignored."""
        self._inbox.put(lambda: self._abort(request_id))

    def stats(self) -> EngineStats:
        """Counters of the engine at this moment."""
        return self._llm.stats()

    async def shutdown(self) -> None:
        """Aborts what runs and stops the thread. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _abort(self, request_id: str) -> None:
        delta = self._llm.engine.abort(request_id)
        if delta is not None:
            self._send(request_id, delta)

    def _send(self, request_id: str, item: RequestDelta | BaseException) -> None:
        sink = self._sinks.get(request_id)
        if sink is not None:
            sink(item)

    def _loop(self) -> None:
        engine = self._llm.engine
        engine.while_computing = self._obey_waiting
        while True:
            try:
                command = self._inbox.get(block=not engine.has_work)
            except queue.Empty:
                self._step()
                continue
            if command is None:
                break
            command()
        self._end_all(RuntimeError("the engine was shut down"))

    def _obey_waiting(self) -> None:
        """Runs what came in while a step is computed; the end of all waits for the end of the step."""
        for _ in range(self._inbox.qsize()):
            command = self._inbox.get()
            if command is None:
                self._inbox.put(None)
                return
            command()

    def _add(self, request: Request) -> None:
        try:
            self._llm.engine.add(request)
        except ValueError as error:
            self._send(request.request_id, error)

    def _step(self) -> None:
        try:
            for delta in self._llm.engine.step():
                self._send(delta.request_id, delta)
        except Exception as error:
            _log.exception("the engine's step failed outside of a batch; all requests end")
            self._end_all(error)

    def _end_all(self, error: BaseException) -> None:
        for request_id in list(self._llm.engine.requests):
            self._abort(request_id)
        for request_id in list(self._sinks):
            self._send(request_id, error)


def _deliver(
    loop: asyncio.AbstractEventLoop,
    deltas: asyncio.Queue[RequestDelta | BaseException],
    item: RequestDelta | BaseException,
) -> None:
    # A caller that closed its loop has nobody left to tell.
    if not loop.is_closed():
        loop.call_soon_threadsafe(deltas.put_nowait, item)


def _raise_failed(request: Request) -> None:
    if request.finish_reason is FinishReason.ERROR:
        raise RuntimeError(f"{request.request_id}: the step failed") from request.error


def _text(path: object) -> str | None:
    return None if path is None else str(path)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    if several and isinstance(several[0], int):
        return [several]  # type: ignore[list-item]
    return several  # type: ignore[return-value]


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError("params", f"{len(params)} of them", f"one, or one for each of {count} prompts")
    return list(params)
