"""Malformed requests get documented status codes; the server lives, answers others, and its memory is flat."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from support.router_stack import stack
from support.toy_cluster import run

_SERVICE = "/jetflow.inference.v1.JetFlowInference/"
_METHODS: dict[str, tuple[type, bool]] = {
    "GenerateStream": (pb.GenerateRequest, True),
    "GenerateOnce": (pb.GenerateRequest, False),
    "Tokenize": (pb.TokenizeRequest, False),
    "Detokenize": (pb.DetokenizeRequest, False),
    "AbortRequest": (pb.AbortRequestRequest, False),
    "GetModelCard": (pb.GetModelCardRequest, False),
}
_DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
_FLOATS = (0.0, -1.0, 1.0, 0.5, 1e300, -1e-300, math.inf, -math.inf, math.nan)
_INTS = (0, 1, 2, 7, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_STRINGS = ("", "a", "for i", "\x00", "\u00e9\U0001f600", "x" * 200, " ", "../..", "%s{}", "\ud7ff\ue000", "a" * 5000)
#: Requests at a time, and the growth of the process that is no leak.
_NUM_CONCURRENT, _FLAT_BYTES = 16, 32 * 2**20


def fuzzed(kind: Any, rng: random.Random, depth: int = 0) -> Any:
    """A message with any fields set to anything."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if rng.random() > (0.6 if depth == 0 else 0.3):
            continue
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            for _ in range(rng.choice((1, 3, 5000))):
                getattr(message, field.name)[rng.choice(_INTS) % 2**32] = rng.choice(_FLOATS)
        elif field.is_repeated:
            count = rng.choice((0, 1, 2, 30, 2000))
            target = getattr(message, field.name)
            if field.message_type is not None:
                target.extend(fuzzed(field.message_type._concrete_class, rng, depth + 1) for _ in range(min(count, 30)))
            else:
                target.extend(_value(field, rng) for _ in range(count))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(fuzzed(field.message_type._concrete_class, rng, depth + 1))
        else:
            setattr(message, field.name, _value(field, rng))
    return message


def _value(field: Any, rng: random.Random) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            return rng.choice(_STRINGS)
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return rng.choice(_FLOATS)
        case field.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 3, 99))
        case field.CPPTYPE_UINT32:
            return rng.choice(_INTS) % 2**32
        case _:
            return rng.choice(_INTS)


def near_miss(rng: random.Random) -> pb.GenerateRequest:
    """A good request with one or two fields gone wrong."""
    message = pb.GenerateRequest(text="for i", sampling=pb.SamplingParams(max_tokens=4))
    other = fuzzed(pb.SamplingParams, rng)
    for field, value in rng.sample(other.ListFields(), min(2, len(other.ListFields()))):
        if field.is_repeated or field.message_type is not None:
            getattr(message.sampling, field.name).MergeFrom(value)
        else:
            setattr(message.sampling, field.name, value)
    return message


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes of a message, cut, changed, or with text that is no UTF-8."""
    way = rng.randrange(5)
    if way == 0:
        return data[: rng.randrange(len(data) + 1)]
    if way == 1:
        return data + rng.randbytes(rng.randrange(1, 40))
    if way == 2:
        return rng.randbytes(rng.randrange(1, 200))
    if way == 3:
        return b"\x12\x04\xff\xfe\xc0\x80" + data
    changed = bytearray(data or b"\x00")
    for _ in range(rng.randrange(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def a_request(rng: random.Random) -> tuple[str, bytes]:
    """A method and what is sent to it."""
    method = rng.choice([*_METHODS, "GenerateStream", "GenerateOnce"])
    kind, _ = _METHODS[method]
    is_near = kind is pb.GenerateRequest and rng.random() < 0.5
    data = (near_miss(rng) if is_near else fuzzed(kind, rng)).SerializeToString()
    chance = rng.random()
    if chance < 0.3:
        data = damaged(data, rng)
    elif chance < 0.303:
        data = pb.GenerateRequest(text="x" * (17 * 2**20)).SerializeToString()
    return method, data


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("num_requests", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_get_documented_codes(
    local: LLM, frontends: list[EngineFrontend], target: Path, num_requests: int
) -> None:
    rng = random.Random(num_requests)
    codes: Counter[grpc.StatusCode] = Counter()
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    wanted = local.generate(["for i"], greedy)[0]

    async def one(channel: Any, method: str, data: bytes) -> None:
        make = channel.unary_stream if _METHODS[method][1] else channel.unary_unary
        call = make(_SERVICE + method)(data, timeout=2.0)
        if _METHODS[method][1]:
            with suppress(grpc.RpcError):
                async for _ in call:
                    pass
        code, details = await call.code(), await call.details()
        assert code in _DOCUMENTED, (code, method, data[:200])
        assert "Traceback" not in (details or "") and ".py" not in (details or "")
        codes[code] += 1

    async def test() -> None:
        async with stack(frontends, target) as made:
            options = [("grpc.max_send_message_length", -1)]
            before = 0
            async with grpc.aio.insecure_channel(f"127.0.0.1:{made.router.port}", options=options) as channel:
                for first in range(0, num_requests, _NUM_CONCURRENT):
                    if first * 2 >= num_requests and not before:
                        before = resident_bytes()
                    requests = [a_request(rng) for _ in range(_NUM_CONCURRENT)]
                    await asyncio.gather(*(one(channel, method, data) for method, data in requests))
                growth = resident_bytes() - before
            await made.is_idle()
            found = await made.client.generate("for i", greedy)
            assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
            print(f"{dict(codes)}; memory grew by {growth / 2**20:.1f} MiB in the second half")
            assert growth < _FLAT_BYTES

    run(test, 1800)
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > num_requests // 4
    assert codes[grpc.StatusCode.OK] > num_requests // 50
