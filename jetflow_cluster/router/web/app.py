"""The routes over HTTP, as one ASGI application around the servicer that answers gRPC."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jetflow_cluster.router.gate import Gate
from jetflow_cluster.router.servicer import InferenceServicer
from jetflow_cluster.router.text import TextCodec
from jetflow_cluster.router.web.errors import HttpError, http_error, internal_error
from jetflow_cluster.router.web.openai_answers import Answer, model_of
from jetflow_cluster.router.web.openai_requests import Kind, read_request
from jetflow_cluster.router.web.page_files import page_routes
from jetflow_cluster.router.web.transport import EventStream, Push, read_json, while_connected
from jetflow_cluster.rpc.limits import MAX_REQUEST_BYTES
from jetflow_cluster.rpc.v1 import inference_pb2 as pb

_log = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[ASGIApp]]


class HttpApi:
    """The routes of one router.

    Args:
        servicer: answers, as it does over gRPC.
        codec: the model's tokenizer, if it has one.
        is_serving: whether requests can be served now.
        gate: before every route but those of health and the page.
    """

    def __init__(
        self, servicer: InferenceServicer, codec: TextCodec | None, is_serving: Callable[[], bool], gate: Gate
    ):
        self._servicer, self._codec, self._is_serving, self._gate = servicer, codec, is_serving, gate
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/v1/chat/completions", _Guarded(self._chat, self._gate), methods=["POST"]),
            Route("/v1/completions", _Guarded(self._completion, self._gate), methods=["POST"]),
            Route("/v1/models", _Guarded(self._models, self._gate), methods=["GET"]),
            Route("/v1/models/{model:path}", _Guarded(self._model, self._gate), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            *page_routes(),
        ]

    async def _chat(self, request: Request) -> ASGIApp:
        return await self._generate("chat", request)

    async def _completion(self, request: Request) -> ASGIApp:
        return await self._generate("completion", request)

    async def _generate(self, kind: Kind, request: Request) -> ASGIApp:
        asked = read_request(kind, await read_json(request, MAX_REQUEST_BYTES))
        answer = Answer(asked, self._token_text)
        if asked.is_stream:

            async def produce(push: Push) -> None:
                async def emit(event: pb.GenerateEvent) -> None:
                    for chunk in answer.chunks(event):
                        await push(chunk)

                await self._servicer.generate(asked.message, emit, headers=request.headers.items())

            return EventStream(produce, tell)

        async def gather(event: pb.GenerateEvent) -> None:
            answer.add(event)

        work = self._servicer.generate(asked.message, gather, headers=request.headers.items())
        await while_connected(request.receive, work)
        return JSONResponse(answer.whole())

    async def _models(self, request: Request) -> ASGIApp:
        card = await self._servicer.card("")
        return JSONResponse({"object": "list", "data": [model_of(card, self._created)]})

    async def _model(self, request: Request) -> ASGIApp:
        card = await self._servicer.card(request.path_params["model"])
        return JSONResponse(model_of(card, self._created))

    async def _health(self, request: Request) -> Response:
        is_serving = self._is_serving()
        return JSONResponse({"status": "ok" if is_serving else "unavailable"}, 200 if is_serving else 503)

    def _token_text(self, token_id: int) -> str:
        return self._codec.token_text(token_id) if self._codec is not None else f"token_id:{token_id}"


class _Guarded:
    """An endpoint no exception of which reaches a client but as an answer that was written for it."""

    def __init__(self, endpoint: Endpoint, gate: Gate):
        self._endpoint, self._gate = endpoint, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting(message: Any) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            request = Request(scope, receive)
            with self._gate.enter(request.headers.get("authorization")):
                answer = await self._endpoint(request)
                await answer(scope, receive, noting)
        except ClientDisconnect:
            return
        except HTTPException:
            raise
        except Exception as error:
            if has_begun:
                raise
            found = _known(error)
            await JSONResponse(found.body, found.status, headers=found.headers)(scope, receive, send)


def http_app(routes: list[Route]) -> Starlette:
    """The application."""
    return Starlette(routes=routes, exception_handlers={HTTPException: _told})


async def _told(request: Request, error: Exception) -> Response:
    """No such path or method, in the shape of the other errors."""
    assert isinstance(error, HTTPException)
    body = HttpError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body
    return JSONResponse(body, error.status_code, headers=error.headers)


def tell(error: Exception) -> dict[str, Any]:
    """What is told of an exception behind the beginning of a stream."""
    return _known(error).body


def _known(error: Exception) -> HttpError:
    found = http_error(error)
    if found is None:
        reference = secrets.token_hex(4)
        _log.error("a request over HTTP failed (%s)", reference, exc_info=error)
        found = internal_error(reference)
    return found
