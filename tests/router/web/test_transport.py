"""Bodies and connections as no client library makes them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from jetflow_cluster.rpc.limits import MAX_REQUEST_BYTES
from support.toy_cluster import Cluster, cluster, run, until


async def send(made: Cluster, head: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """One request as it is; status, headers and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", made.routers[0].server.http_port)
    writer.write(f"{head}\r\nhost: x\r\nconnection: close\r\n\r\n".encode() + body)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    top, _, rest = answer.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, rest


def post(body: bytes, kind: str = "application/json") -> tuple[str, bytes]:
    return f"POST /v1/completions HTTP/1.1\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}", body


CASES: dict[str, tuple[tuple[str, bytes], int]] = {
    "no-json": (post(b"{"), 400),
    "no-object": (post(b"[1]"), 400),
    "not-utf-8": (post(b'{"prompt": "\xff"}'), 400),
    "infinite": (post(b'{"prompt": "a", "temperature": Infinity}'), 400),
    "digits": (post(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), 400),
    "half-a-character": (post(b'{"model": "toy", "prompt": "\\ud800"}'), 400),
    "deep": (post(b'{"prompt": ' + b"[" * 100_000 + b"}"), 400),
    "form": (post(b"prompt=a", "application/x-www-form-urlencoded"), 415),
    "untyped": (("POST /v1/completions HTTP/1.1\r\ncontent-length: 15", b'{"prompt": "a"}'), 415),
    "declared-too-large": ((post(b"")[0].replace(": 0", f": {MAX_REQUEST_BYTES + 1}"), b""), 413),
}


@pytest.mark.parametrize("request_, status", CASES.values(), ids=CASES)
def test_bodies_that_are_none(request_: tuple[str, bytes], status: int) -> None:
    async def test() -> None:
        async with cluster(1, http_port=0) as made:
            found, _, body = await send(made, *request_)
            assert found == status
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    run(test)


def test_a_body_that_grows_too_large_is_left() -> None:
    async def test() -> None:
        async with cluster(1, http_port=0) as made:
            parts = [b"%x\r\n" % size + b" " * size + b"\r\n" for size in (*[0xF0000] * 17, 0x20000)]
            head = "POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked"
            assert (await send(made, head, b"".join(parts)))[0] == 413

    run(test)


def test_events_of_a_stream() -> None:
    async def test() -> None:
        async with cluster(1, http_port=0) as made:
            head, body = post(json.dumps({"prompt": [1, 2], "max_tokens": 9, "stream": True, "seed": 1}).encode())
            status, headers, answer = await send(made, head, body)
            assert status == 200 and headers["content-type"].startswith("text/event-stream")
            events = [line for line in answer.decode().splitlines() if line.startswith("data: ")]
            assert events[-1] == "data: [DONE]"
            chunks: list[Any] = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
            assert {chunk["object"] for chunk in chunks} == {"text_completion"}
            assert chunks[-1]["jetflow"]["seed"] == 1

    run(test)


def test_health_follows_the_replicas() -> None:
    async def test() -> None:
        async with cluster(1, http_port=0) as made:
            assert (await send(made, "GET /health HTTP/1.1"))[0] == 200
            made.replicas[0].healthy = False
            await until(lambda: not made.routers[0].server.is_serving)
            assert (await send(made, "GET /health HTTP/1.1"))[0] == 503

    run(test)
