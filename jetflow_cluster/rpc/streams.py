"""The streams that clients return: deltas to iterate over, and the output behind them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import grpc

from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError, error_from_rpc
from jetflow_cluster.rpc.generation import Generation
from jetflow_cluster.rpc.retry import Attempts
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import RequestDelta, RequestOutput

#: Opens a call: the server's address, the message, and the seconds left.
OpenCall = Callable[[str, pb.GenerateRequest, float | None], Any]
#: Seconds that the status of a call is waited for behind its last event.
_STATUS_S = 1.0


def _ended_early() -> StatusError:
    return StatusError.unavailable("the stream ended before the request did")


class _StreamBase:
    """What both kinds of stream tell."""

    def __init__(self, generation: Generation, attempts: Attempts, open_call: OpenCall):
        self._generation, self._attempts, self._open_call = generation, attempts, open_call
        self._call: Any = None

    @property
    def output(self) -> RequestOutput:
        """The request as far as it got; `finish_reason` is set once it ended.

        Tokens that the caller gave as prior output are part of `token_ids`, but their text is no part of `text`.
        """
        return self._generation.output

    @property
    def request_id(self) -> str:
        """The id under which `abort` ends the request now; empty before the server told it.

        It changes when the stream goes on elsewhere; deltas and output keep the first one.
        """
        started = self._generation.started
        return started.request_id if started is not None else ""

    @property
    def started(self) -> pb.Started | None:
        """What the server that runs the request told first: replica, model, seed."""
        return self._generation.started

    @property
    def finished(self) -> pb.Finished | None:
        """What the server told last: timing and how often another replica took over; None before the end."""
        return self._generation.finished

    @property
    def num_calls(self) -> int:
        """Calls that the request took; 1 if nothing failed."""
        return self._generation.num_calls

    def _take(self, event: pb.GenerateEvent) -> RequestDelta | None:
        delta = self._generation.take(event)
        if delta is not None:
            self._attempts.progressed()
        return delta


class GenerationStream(_StreamBase, Iterator[RequestDelta]):
    """The deltas of one request, as they come; the last one is empty and has the finish reason.

    The request is sent when the first delta is asked for. Leaving the context, or `cancel` from any thread, ends it on
    the server; iteration then stops, and `output` has what came, with finish reason ``abort``.

    Iterating raises `StatusError` for a call that failed for good (DATA_LOSS when what came cannot be right) and
    `InvalidFieldsError` for a request that the server cannot honour.
    """

    def __init__(self, generation: Generation, attempts: Attempts, open_call: OpenCall):
        super().__init__(generation, attempts, open_call)
        self._cancelled = threading.Event()
        self._deltas = self._run()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._deltas.close()

    def __next__(self) -> RequestDelta:
        return next(self._deltas)

    def cancel(self) -> None:
        """Ends the request; harmless behind its end."""
        # Known to be wished before the call says so, which is otherwise taken for a lost connection.
        if not self._generation.has_ended:
            self._generation.cancel()
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def _run(self) -> Generator[RequestDelta, None, None]:
        error: StatusError | InvalidFieldsError
        while not self._generation.has_ended:
            try:
                yield from self._run_call()
                error = _ended_early()
            except grpc.RpcError as failure:
                error = error_from_rpc(failure)
            if not self._generation.has_ended:
                self._cancelled.wait(self._attempts.pause_s(error))

    def _run_call(self) -> Iterator[RequestDelta]:
        message = self._generation.next_request()
        call = self._call = self._open_call(self._attempts.address, message, self._attempts.timeout_s)
        try:
            if self._cancelled.is_set():
                return
            for event in call:
                delta = self._take(event)
                if delta is not None:
                    yield delta
                if self._generation.has_ended:
                    return
        finally:
            call.cancel()


class AsyncGenerationStream(_StreamBase, AsyncIterator[RequestDelta]):
    """The deltas of one request, as they come; the last one is empty and has the finish reason.

    As `GenerationStream`, for asyncio: an async iterator and context manager. Cancelling the task that iterates ends
    the request too.
    """

    def __init__(self, generation: Generation, attempts: Attempts, open_call: OpenCall):
        super().__init__(generation, attempts, open_call)
        self._cancelled = asyncio.Event()
        self._deltas = self._run()

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        await self._deltas.aclose()

    def __aiter__(self) -> AsyncIterator[RequestDelta]:
        # One step of the generator for each delta, and no coroutine around it.
        return self._deltas

    async def __anext__(self) -> RequestDelta:
        return await anext(self._deltas)

    def cancel(self) -> None:
        """Ends the request; harmless behind its end."""
        # Known to be wished before the call says so, which is otherwise taken for a lost connection.
        if not self._generation.has_ended:
            self._generation.cancel()
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    async def _run(self) -> AsyncGenerator[RequestDelta, None]:
        error: StatusError | InvalidFieldsError
        while not self._generation.has_ended:
            try:
                async for delta in self._run_call():
                    yield delta
                error = _ended_early()
            except grpc.RpcError as failure:
                error = error_from_rpc(failure)
            if not self._generation.has_ended:
                await self._pause(self._attempts.pause_s(error))

    async def _run_call(self) -> AsyncIterator[RequestDelta]:
        message = self._generation.next_request()
        call = self._call = self._open_call(self._attempts.address, message, self._attempts.timeout_s)
        events = aiter(call)
        try:
            async for event in events:
                delta = self._take(event)
                if delta is not None:
                    yield delta
                if self._generation.has_ended:
                    # Its status, so that nothing of the call comes when this event loop may be no more.
                    with contextlib.suppress(TimeoutError, grpc.RpcError):
                        await asyncio.wait_for(anext(events, None), _STATUS_S)
                    return
        except asyncio.CancelledError:
            # The call says so too when it was `cancel` that ended it, or the client's `close`; the task itself goes on.
            if _is_task_cancelled():
                raise
        finally:
            call.cancel()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._cancelled.wait()
        except TimeoutError:
            pass


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
