"""A router leaves and another has its port: no connection is refused or reset, and no stream cut."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.errors import StatusError
from support.toy_cluster import PROMPT, Cluster, cluster, failure, request, run, stream, until
from support.toy_replica import MODEL, expected

openai = pytest.importorskip("openai")

PATH = "/v1/completions"


def stock_client(port: int, **options: Any) -> Any:
    """OpenAI's own, which must not have to try again."""
    return openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, **options)


def body(num_tokens: int, seed: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": num_tokens, "seed": seed}


@asynccontextmanager
async def second_router(made: Cluster) -> AsyncIterator[RouterServer]:
    """Another router on the ports of the first, which knows the same replicas."""
    first = made.routers[0].server
    ports = {"port": first.port, "http_port": first.http_port or None}
    second = RouterServer(dataclasses.replace(first.config, router_id="router-1", **ports))
    await second.start()
    second.set_replicas({replica.replica_id: replica.address for replica in made.replicas})
    await until(lambda: second.is_serving)
    try:
        yield second
    finally:
        await second.stop()


async def read_stream(client: Any, num_tokens: int, seed: int) -> tuple[list[int], str | None]:
    """Tokens of a stream, and why it finished, or the error that was its last event."""
    token_ids: list[int] = []
    reason = None
    extra = {"return_token_ids": True}
    chunks = await client.completions.create(**body(num_tokens, seed), stream=True, extra_body=extra)
    try:
        async for chunk in chunks:
            token_ids += getattr(chunk.choices[0], "token_ids", ())
            reason = chunk.choices[0].finish_reason
    except openai.APIError as error:
        return token_ids, error.message
    return token_ids, reason


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int) -> tuple[dict[str, str], Any]:
    """A request on a connection that was made before; headers and body of its answer."""
    data = json.dumps(body(4, seed) | {"return_token_ids": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    top, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    assert top.split()[1] == "200"
    headers = dict(line.lower().split(": ", 1) for line in lines)
    answer = json.loads(await reader.readexactly(int(headers["content-length"])))
    assert answer["choices"][0]["token_ids"] == expected(PROMPT, seed, 4).token_ids
    return headers, answer


def connect(port: int, count: int) -> list[socket.socket]:
    """Connections that the kernel makes, and no server has accepted yet."""
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


async def use_each(sockets: list[socket.socket]) -> None:
    async def use(each: socket.socket, seed: int) -> None:
        reader, writer = await asyncio.open_connection(sock=each)
        await ask(reader, writer, seed)
        writer.close()

    await asyncio.gather(*(use(each, seed) for seed, each in enumerate(sockets)))


def test_a_port_goes_from_router_to_router_without_a_failed_request() -> None:
    async def test() -> None:
        options: dict[str, Any] = {"share_ports": True, "http_port": 0}
        async with cluster(1, replica={"step_s": 0.02}, **options) as made:
            first = made.routers[0].server
            num_served, problems, is_over = 0, list[str](), asyncio.Event()

            async def go_on(keeps: bool, seed: int) -> None:
                """Requests one behind the other, each on a connection of its own or all on one that is kept."""
                nonlocal num_served
                headers = {} if keeps else {"connection": "close"}
                wanted = expected(PROMPT, seed, 4).token_ids
                async with stock_client(first.http_port, default_headers=headers) as client:
                    while not is_over.is_set():
                        try:
                            answer = await client.completions.create(
                                **body(4, seed), extra_body={"return_token_ids": True}
                            )
                        except openai.APIError as error:
                            problems.append(f"{type(error).__name__}: {error}")
                            return
                        assert answer.choices[0].token_ids == wanted
                        num_served += 1

            async with stock_client(first.http_port) as client, asyncio.TaskGroup() as tasks:
                streams = [tasks.create_task(read_stream(client, 120, seed)) for seed in range(6)]
                await until(lambda: len(made.running) == 6)
                kept = [await asyncio.open_connection("127.0.0.1", first.http_port) for _ in range(4)]
                for seed, (reader, writer) in enumerate(kept):
                    assert "connection" not in (await ask(reader, writer, seed))[0]
                going = [tasks.create_task(go_on(seed % 2 == 0, seed)) for seed in range(4)]
                async with second_router(made):
                    waiting = connect(first.http_port, 32)
                    leaving = tasks.create_task(first.hand_over(60))
                    await asyncio.sleep(0)
                    waiting += connect(first.http_port, 32)
                    again = await asyncio.gather(*(ask(*each, seed) for seed, each in enumerate(kept)))
                    assert [headers["connection"] for headers, _ in again] == ["close"] * len(kept)
                    for reader, _ in kept:
                        assert await reader.read() == b""
                    await use_each(waiting)
                    for seed, task in enumerate(streams):
                        assert await task == (expected(PROMPT, seed, 120).token_ids, "length")
                    assert await leaving
                    before = num_served
                    await until(lambda: num_served >= before + 20 or problems)
                    is_over.set()
                    await asyncio.gather(*going)
                    assert problems == []
                    await first.stop()
                    await use_each(connect(first.http_port, 8))

    run(test)


def test_no_connection_of_grpc_is_reset() -> None:
    """Connections of the moment before and behind, which the kernel made: each is greeted by one of the routers."""
    preface, settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

    async def greeted(each: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=each)
        writer.write(preface + settings)
        assert (await reader.readexactly(4))[3:] == b"\x04", "a frame of settings comes first"
        writer.close()

    async def test() -> None:
        async with cluster(1, share_ports=True) as made, second_router(made):
            first = made.routers[0].server
            sockets = connect(first.port, 32)
            leaving = asyncio.create_task(first.hand_over(60))
            await asyncio.sleep(0)
            for _ in range(12):
                # While the port is handed over, closed, and is the other's.
                sockets += connect(first.port, 16)
                await asyncio.sleep(0.05)
            await asyncio.gather(*map(greeted, sockets))
            assert await leaving

    run(test)


def test_a_stream_that_takes_too_long_is_told_so_over_both_protocols() -> None:
    async def test() -> None:
        async with cluster(1, replica={"step_s": 0.02}, share_ports=True, http_port=0) as made:
            first = made.routers[0].server
            async with stock_client(first.http_port) as client:
                over_http = asyncio.create_task(read_stream(client, 2000, 1))
                over_grpc = asyncio.create_task(failure(stream(made.stub, request(2000, seed=1))))
                await until(lambda: len(made.running) == 2)
                async with second_router(made):
                    await asyncio.sleep(0.3)
                    assert not await first.hand_over(0.5)
                token_ids, last = await over_http
                assert token_ids == expected(PROMPT, 1, len(token_ids)).token_ids and token_ids
                assert last == "this server stops"
                error = await over_grpc
                assert isinstance(error, StatusError)
                assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "this server stops")
                await until(lambda: not made.running)

    run(test)


@pytest.mark.parametrize("is_shared", [False, True], ids=["own port", "shared port"])
def test_a_router_without_another_leaves_at_once(is_shared: bool) -> None:
    async def test() -> None:
        async with cluster(1, share_ports=is_shared, http_port=0) as made:
            first = made.routers[0].server
            reader, writer = await asyncio.open_connection("127.0.0.1", first.http_port)
            await ask(reader, writer, 1)
            began = asyncio.get_running_loop().time()
            assert await first.hand_over(60)
            assert asyncio.get_running_loop().time() - began < 4
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(ConnectionRefusedError):
                connect(first.http_port, 1)

    run(test)
