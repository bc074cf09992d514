"""Certificates, tokens and secrets on the ports themselves, and clients that are refused or shed."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from jetflow_cluster.router.safety import SafetyConfig
from jetflow_cluster.rpc.client import AsyncJetFlowClient
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.limits import MAX_REQUEST_BYTES
from jetflow_cluster.rpc.secret import SecretInterceptor, split_address, with_secret
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from jetflow_cluster.types import SamplingParams
from support.certificates import TOKEN, Files
from support.toy_cluster import PROMPT, cluster, failure, request, run, stream, until
from support.toy_replica import expected

pytest.importorskip("trustme")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def fetch(port: int, path: str, *, token: str | None = None, context: ssl.SSLContext | None = None) -> tuple[int, Any]:
    kind = "https" if context is not None else "http"
    asked = urllib.request.Request(f"{kind}://127.0.0.1:{port}{path}")
    if token is not None:
        asked.add_header("authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(asked, timeout=30, context=context) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_tokens_are_wanted_over_both_protocols(files: Files) -> None:
    async def test() -> None:
        safety = SafetyConfig(token_file=str(files.tokens))
        async with cluster(1, safety=safety, http_port=0) as made:
            for options in ({}, {"metadata": metadata("another-token-it-is")}):
                error = await failure(stream(made.stub, request(), **options))
                assert error.code is grpc.StatusCode.UNAUTHENTICATED
            (await stream(made.stub, request(), metadata=metadata(TOKEN))).check(request())
            port = made.routers[0].server.http_port
            status, body = await asyncio.to_thread(fetch, port, "/v1/models")
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
            assert (await asyncio.to_thread(fetch, port, "/v1/models", token=TOKEN))[0] == 200
            assert (await asyncio.to_thread(fetch, port, "/health"))[0] == 200
            async with AsyncJetFlowClient(made.routers[0].address, token=TOKEN) as client:
                assert await client.health()
                found = await client.generate(PROMPT, SamplingParams(max_tokens=9, seed=1))
                assert found.token_ids == expected(PROMPT, 1, 9).token_ids

    run(test)


async def load_of(port: int, files: Files, own: dict[str, bytes]) -> Any:
    """The server's load, over TLS."""
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes(), **own)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        stub: Any = inference_pb2_grpc.JetFlowInferenceStub(channel)
        return await stub.GetServerLoad(pb.GetServerLoadRequest(), timeout=10)


def certificate_of(port: int, files: Files, own: dict[str, bytes]) -> bytes:
    """What the HTTP port shows."""
    context = ssl.create_default_context(cafile=str(files.ca))
    if own:
        (files.folder / "client.pem").write_bytes(own["private_key"] + own["certificate_chain"])
        context.load_cert_chain(files.folder / "client.pem")
    assert fetch(port, "/health", context=context)[0] == 503
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True) or b""


@pytest.mark.parametrize("is_mutual", [False, True], ids=["tls", "mutual"])
def test_certificates(files: Files, is_mutual: bool) -> None:
    async def test() -> None:
        safety = SafetyConfig(
            tls_cert_file=str(files.cert),
            tls_key_file=str(files.key),
            tls_client_ca_file=str(files.ca) if is_mutual else None,
        )
        async with cluster(0, 1, safety=safety, http_port=0) as made:
            server = made.routers[0].server
            key, chain = files.client()
            own = {"private_key": key, "certificate_chain": chain} if is_mutual else {}
            assert (await load_of(server.port, files, own)).router_id == "router-0"
            if is_mutual:
                assert (await failure(load_of(server.port, files, {}))).code is grpc.StatusCode.UNAVAILABLE
            assert (await failure(made.stub.GetServerLoad(pb.GetServerLoadRequest(), timeout=5))).code in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
            first = await asyncio.to_thread(certificate_of, server.http_port, files, own)
            files.renew()
            wanted = ssl.PEM_cert_to_DER_cert(files.pem.decode())
            began = time.monotonic()
            while await asyncio.to_thread(certificate_of, server.http_port, files, own) != wanted:
                assert time.monotonic() - began < 20, "the new certificate is not served"
                await asyncio.sleep(0.2)
            assert first != wanted
            assert (await load_of(server.port, files, own)).router_id == "router-0"

    run(test)


def test_routers_end_each_others_requests_behind_tokens(files: Files) -> None:
    async def test() -> None:
        safety = SafetyConfig(token_file=str(files.tokens))
        async with cluster(1, 2, safety=safety, replica={"step_s": 0.02}) as made:
            peers = {router.server.config.router_id: router.server.peer_address for router in made.routers}
            assert all("@" in address for address in peers.values())
            for router in made.routers:
                router.server.set_peers(peers)
            message = request(900, request_id="mine")
            task = asyncio.create_task(stream(made.stub, message, metadata=metadata(TOKEN)))
            await until(lambda: len(made.running) == 1)
            other = made.routers[1].stub
            answer = await other.AbortRequest(pb.AbortRequestRequest(request_ids=["mine"]), metadata=metadata(TOKEN))
            assert list(answer.aborted_ids) == ["mine"]
            finished = (await task).finished
            assert finished is not None and finished.finish_reason == pb.FINISH_REASON_ABORT
            # Without the secret the port for routers does nothing.
            async with grpc.aio.insecure_channel(split_address(peers["router-0"])[0]) as channel:
                stub: Any = inference_pb2_grpc.JetFlowInferenceStub(channel)
                for options in ({}, {"metadata": metadata(TOKEN)}):
                    error = await failure(stub.GetServerLoad(pb.GetServerLoadRequest(), **options))
                    assert error.code is grpc.StatusCode.UNAUTHENTICATED

    run(test)


def test_addresses_carry_secrets() -> None:
    address = with_secret("s" * 16, "host:1")
    assert split_address(address) == ("host:1", (("x-jetflow-secret", "s" * 16),))
    assert split_address("host:1") == ("host:1", ()) == split_address(with_secret("", "host:1"))
    with pytest.raises(ValueError, match="at least 16"):
        SecretInterceptor("short")


def test_an_oversized_message_is_refused() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            message = request()
            message.token_ids.ids.extend([2**28] * (MAX_REQUEST_BYTES // 4))
            error = await failure(stream(made.stub, message))
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


async def rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_that_takes_nothing_is_shed(protocol: str) -> None:
    async def test() -> None:
        async with cluster(1, http_port=0, client_stall_s=0.5, replica={"step_s": 0.0}) as made:
            server = made.routers[0].server
            if protocol == "grpc":
                options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
                async with grpc.aio.insecure_channel(made.routers[0].address, options=options) as channel:
                    stub: Any = inference_pb2_grpc.JetFlowInferenceStub(channel)
                    call = stub.GenerateStream(request(4000, logprobs=64))
                    await call.read()
                    await until(lambda: server.num_running == 1)
                    await until(lambda: server.num_running == 0)
                    with pytest.raises(grpc.aio.AioRpcError):
                        await rest(call)
            else:
                narrow = socket.socket()
                narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                narrow.connect(("127.0.0.1", server.http_port))
                reader, writer = await asyncio.open_connection(sock=narrow, limit=1024)
                # More than the kernel's own buffers take.
                body = json.dumps({"prompt": PROMPT, "max_tokens": 40_000, "stream": True, "logprobs": 20}).encode()
                head = (
                    "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
                await until(lambda: server.num_running == 1)
                await until(lambda: server.num_running == 0)
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                writer.close()
            await made.is_clean()

    run(test)


FLOOD, SLOW, UNKNOWN = "this-one-floods-the-port", "this-one-does-not-read", "nobody-has-such-a-token"


class BadClients:
    """Callers without a token, beyond their limits, with messages that are too large, and that read nothing."""

    def __init__(self, address: str):
        self.codes: Counter[str] = Counter()
        self._channels = [grpc.aio.insecure_channel(address, options=[("c", i)]) for i in range(4)]

    async def __aenter__(self) -> BadClients:
        unknown, flooding, slow, large = self._channels
        bad = [self._pester(unknown, UNKNOWN, request()) for _ in range(2)]
        bad += [self._pester(flooding, FLOOD, request(10)) for _ in range(4)]
        bad += [self._stall(slow) for _ in range(4)]
        self._tasks = [asyncio.create_task(each) for each in [*bad, self._oversize(large)]]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _pester(self, channel: Any, token: str, message: pb.GenerateRequest) -> None:
        stub: Any = inference_pb2_grpc.JetFlowInferenceStub(channel)
        while True:
            try:
                await stream(stub, message, metadata=metadata(token))
            except StatusError as error:
                self.codes[error.code.name] += 1
            await asyncio.sleep(0.01)

    async def _oversize(self, channel: Any) -> None:
        message = request()
        message.token_ids.ids.extend([2**28] * (MAX_REQUEST_BYTES // 4))
        # Written out once: that would cost this loop time, which is the server's too.
        data = message.SerializeToString()
        call = channel.unary_stream("/jetflow.inference.v1.JetFlowInference/GenerateStream")
        while True:
            error = await failure(call(data, metadata=metadata(FLOOD)).read())
            self.codes[f"large {error.code.name}"] += 1
            await asyncio.sleep(0.5)

    async def _stall(self, channel: Any) -> None:
        stub: Any = inference_pb2_grpc.JetFlowInferenceStub(channel)
        while True:
            call = stub.GenerateStream(request(4000, logprobs=64), metadata=metadata(SLOW))
            await call.read()
            await asyncio.sleep(2)
            call.cancel()


async def speed(client: AsyncJetFlowClient, seed: int) -> float:
    """Tokens per second of one stream."""
    began = time.monotonic()
    found = await client.generate(PROMPT, SamplingParams(max_tokens=200, seed=seed))
    assert found.token_ids == expected(PROMPT, seed, 200).token_ids
    return 200 / (time.monotonic() - began)


@pytest.mark.slow
def test_honest_streams_keep_their_speed_beside_bad_clients(files: Files) -> None:
    """Steps of a fixed time, so that what is measured is the router's part alone."""

    async def test() -> None:
        files.tokens.write_text(
            f"- {{name: honest, token: {TOKEN}}}\n"
            f"- {{name: flood, token: {FLOOD}, requests_per_s: 1, max_concurrent: 4}}\n"
            f"- {{name: slow, token: {SLOW}, max_concurrent: 4}}\n"
        )
        options = {"safety": SafetyConfig(token_file=str(files.tokens)), "client_stall_s": 1.0, "http_port": 0}
        async with cluster(1, replica={"step_s": 0.03}, **options) as made:
            address = made.routers[0].address
            async with AsyncJetFlowClient(address, token=TOKEN, timeout_s=100) as honest:
                alone = await asyncio.gather(*(speed(honest, seed) for seed in range(8)))
                async with BadClients(address) as bad:
                    beside = await asyncio.gather(*(speed(honest, seed) for seed in range(8)))
            ratio = sum(beside) / sum(alone)
            print(f"8 honest streams kept {ratio:.2f} of their speed; refused: {dict(bad.codes)}")
            assert ratio >= 0.8
            assert bad.codes["UNAUTHENTICATED"] > 20 and bad.codes["RESOURCE_EXHAUSTED"] > 20
            assert bad.codes["large RESOURCE_EXHAUSTED"] > 0
            await made.is_clean()

    run(test)
