"""Clients of the API.

    with JetFlowClient("host:9000") as client:
        print(client.generate("def quicksort(items):", SamplingParams(max_tokens=64, temperature=0)).text)

A call that could not be served is sent again a few times, to another server if there is one. A stream that broke goes
on from the tokens that came, on any server; its tokens and text are those of an unbroken one, greedy or sampled.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.errors import DOMAIN, StatusError, error_from_rpc
from jetflow_cluster.rpc.generation import Generation, Prompt, refuse_trees, request_to_proto, set_input
from jetflow_cluster.rpc.options import CHANNEL_OPTIONS
from jetflow_cluster.rpc.retry import Attempts, RetryPolicy, Servers
from jetflow_cluster.rpc.streams import AsyncGenerationStream, GenerationStream
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from jetflow_cluster.types import RequestOutput, SamplingParams

#: Name under which `grpc.health.v1` tells whether requests can be served now.
SERVICE = f"{DOMAIN}.JetFlowInference"


def tls_credentials(
    ca_file: str | Path | None = None, cert_file: str | Path | None = None, key_file: str | Path | None = None
) -> grpc.ChannelCredentials:
    """What a client needs for TLS, from PEM files.

    Args:
        ca_file: authorities that the server's certificate is checked by; None is those of gRPC.
        cert_file: the client's own chain, for a server that wants one (mutual TLS).
        key_file: its key.

    Raises:
        ValueError: a certificate without its key, or a key without its certificate.
        OSError: a file cannot be read.
    """
    if (cert_file is None) != (key_file is None):
        raise ValueError(f"key_file = {str(key_file)!r}: certificate and key must be given together")
    ca, key, chain = (None if file is None else Path(file).read_bytes() for file in (ca_file, key_file, cert_file))
    return grpc.ssl_channel_credentials(ca, key, chain)


class _Channels:
    """A channel for each server, opened on first use."""

    def __init__(self, api: Any, credentials: grpc.ChannelCredentials | None):
        self._api, self._credentials = api, credentials
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def get(self, address: str) -> Any:
        """The channel to an address. Raises StatusError (CANCELLED) behind `close`."""
        with self._lock:
            if self._is_closed:
                raise StatusError.cancelled("the client is closed")
            if address not in self._open:
                self._open[address] = (
                    self._api.insecure_channel(address, options=CHANNEL_OPTIONS)
                    if self._credentials is None
                    else self._api.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)
                )
            return self._open[address]

    def close(self) -> list[Any]:
        """Opens none any more; returns those that are open, which are the caller's to close."""
        with self._lock:
            self._is_closed = True
            channels = list(self._open.values())
            self._open.clear()
        return channels


class _ClientBase:
    """What both clients have: servers, channels, and the making of messages."""

    def __init__(
        self,
        api: Any,
        servers: str | Sequence[str],
        timeout_s: float | None,
        retry: RetryPolicy | None,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
    ):
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._retry = retry or RetryPolicy()
        self._timeout_s = timeout_s
        self._servers = Servers(servers, quarantine_s=self._retry.quarantine_s)
        self._channels = _Channels(api, credentials)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses that calls go to."""
        return self._servers.addresses

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._servers, self._timeout_s if timeout_s is None else timeout_s)

    def _open_stream(self, address: str, message: pb.GenerateRequest, timeout_s: float | None) -> Any:
        return self._stub(address).GenerateStream(message, timeout=timeout_s, metadata=self._metadata)

    def _stub(self, address: str) -> Any:
        return inference_pb2_grpc.JetFlowInferenceStub(self._channels.get(address))

    def _health_stub(self, address: str) -> Any:
        return health_pb2_grpc.HealthStub(self._channels.get(address))


def _tokenize_request(prompt: str | Sequence[Mapping[str, str]]) -> pb.TokenizeRequest:
    message = pb.TokenizeRequest()
    set_input(message, prompt)
    checks.check_tokenize(message)
    return message


def _is_serving(answer: Any) -> bool:
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class JetFlowClient(_ClientBase):
    """A client of one or more routers. Safe to use from several threads; close it, or use it as a context manager.

    Args:
        servers: addresses such as ``host:9000``; calls take turns.
        timeout_s: seconds for each operation, with all its retries and resumes; None is no limit.
        retry: when to try again.
        credentials: for TLS, as `tls_credentials` makes them; None is an insecure channel.
        token: shown with every call; None shows none.

    Every method raises `StatusError` with the gRPC code, a message and details when it failed for good, and
    `InvalidRequestError` (as `InvalidFieldsError`, with every offending field) for what cannot be honoured.
    `timeout_s` of a method stands for that operation in place of the client's.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ):
        super().__init__(grpc, servers, timeout_s, retry, credentials, token)

    def __enter__(self) -> JetFlowClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections for good; streams that still run end with CANCELLED."""
        for channel in self._channels.close():
            channel.close()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, timeout_s: float | None = None, **options: str
    ) -> RequestOutput:
        """Completes one prompt; the arguments are those of `stream`."""
        refuse_trees(params)
        with self.stream(prompt, params, timeout_s=timeout_s, **options) as stream:
            for _ in stream:
                pass
            return stream.output

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, timeout_s: float | None = None, **options: str
    ) -> GenerationStream:
        """The deltas of one prompt's completion as they come; `output` of the stream has it whole.

        Args:
            prompt: text, token ids, or messages with ``role`` and ``content``.
            params: how to sample and when to stop; None is `SamplingParams()`.
            timeout_s: seconds for the whole request.
            options: ``request_id``, unique among running requests, left out for the server to choose; ``model``, left
                out for whichever is served; ``session_id``, so that requests of one session share a replica's cache.
        """
        message = request_to_proto(prompt, params or SamplingParams(), **options)
        return GenerationStream(Generation(message), self._attempts(timeout_s), self._open_stream)

    def abort(self, *request_ids: str, timeout_s: float | None = None) -> tuple[str, ...]:
        """Ends requests, whichever router they came through; returns the ids of those that ran."""
        message = pb.AbortRequestRequest(request_ids=request_ids)
        checks.check_abort(message)
        return tuple(self._call("AbortRequest", message, timeout_s).aborted_ids)

    def model_card(self, model: str = "", *, timeout_s: float | None = None) -> pb.ModelCard:
        """What is served, and its limits."""
        return self._call("GetModelCard", pb.GetModelCardRequest(model=model), timeout_s)

    def server_load(self, *, timeout_s: float | None = None) -> pb.ServerLoad:
        """The load of every replica, as one of the routers sees it."""
        return self._call("GetServerLoad", pb.GetServerLoadRequest(), timeout_s)

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, timeout_s: float | None = None) -> list[int]:
        """Token ids of a text, or of messages by the model's chat template."""
        return list(self._call("Tokenize", _tokenize_request(prompt), timeout_s).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids."""
        return str(self._call("Detokenize", pb.DetokenizeRequest(token_ids=token_ids), timeout_s).text)

    def health(self, *, timeout_s: float = 5.0) -> bool:
        """True when a server says that it can serve requests now."""
        question = health_pb2.HealthCheckRequest(service=SERVICE)
        for address in self.servers:
            try:
                if _is_serving(self._health_stub(address).Check(question, timeout=timeout_s)):
                    return True
            except grpc.RpcError:
                continue
        return False

    def _call(self, method: str, message: Any, timeout_s: float | None) -> Any:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                call = getattr(self._stub(attempts.address), method)
                return call(message, timeout=attempts.timeout_s, metadata=self._metadata)
            except grpc.RpcError as failure:
                time.sleep(attempts.pause_s(error_from_rpc(failure)))


class AsyncJetFlowClient(_ClientBase):
    """`JetFlowClient` for asyncio: the same methods, arguments and errors; `stream` returns an async iterator."""

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ):
        super().__init__(grpc.aio, servers, timeout_s, retry, credentials, token)

    async def __aenter__(self) -> AsyncJetFlowClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections for good; streams that still run end with CANCELLED."""
        for channel in self._channels.close():
            await channel.close()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, timeout_s: float | None = None, **options: str
    ) -> RequestOutput:
        """Completes one prompt; see `JetFlowClient.stream` for the arguments."""
        refuse_trees(params)
        async with self.stream(prompt, params, timeout_s=timeout_s, **options) as stream:
            async for _ in stream:
                pass
            return stream.output

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, timeout_s: float | None = None, **options: str
    ) -> AsyncGenerationStream:
        """The deltas of one prompt's completion as they come; see `JetFlowClient.stream`."""
        message = request_to_proto(prompt, params or SamplingParams(), **options)
        return AsyncGenerationStream(Generation(message), self._attempts(timeout_s), self._open_stream)

    async def abort(self, *request_ids: str, timeout_s: float | None = None) -> tuple[str, ...]:
        """Ends requests, whichever router they came through; returns the ids of those that ran."""
        message = pb.AbortRequestRequest(request_ids=request_ids)
        checks.check_abort(message)
        return tuple((await self._call("AbortRequest", message, timeout_s)).aborted_ids)

    async def model_card(self, model: str = "", *, timeout_s: float | None = None) -> pb.ModelCard:
        """What is served, and its limits."""
        return await self._call("GetModelCard", pb.GetModelCardRequest(model=model), timeout_s)

    async def server_load(self, *, timeout_s: float | None = None) -> pb.ServerLoad:
        """The load of every replica, as one of the routers sees it."""
        return await self._call("GetServerLoad", pb.GetServerLoadRequest(), timeout_s)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, timeout_s: float | None = None) -> list[int]:
        """Token ids of a text, or of messages by the model's chat template."""
        return list((await self._call("Tokenize", _tokenize_request(prompt), timeout_s)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids."""
        return str((await self._call("Detokenize", pb.DetokenizeRequest(token_ids=token_ids), timeout_s)).text)

    async def health(self, *, timeout_s: float = 5.0) -> bool:
        """True when a server says that it can serve requests now."""
        question = health_pb2.HealthCheckRequest(service=SERVICE)
        for address in self.servers:
            try:
                if _is_serving(await self._health_stub(address).Check(question, timeout=timeout_s)):
                    return True
            except grpc.RpcError:
                continue
        return False

    async def _call(self, method: str, message: Any, timeout_s: float | None) -> Any:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                call = getattr(self._stub(attempts.address), method)
                return await call(message, timeout=attempts.timeout_s, metadata=self._metadata)
            except grpc.RpcError as failure:
                await asyncio.sleep(attempts.pause_s(error_from_rpc(failure)))
