"""Trees of steps over gRPC, from the engine to the client: whole, also over a cut wire, and only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from jetflow_cluster import InvalidRequestError, RequestDelta, SamplingParams, SpeculationOptions
from jetflow_cluster.cluster.replica.events import num_bytes_of
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.protocols import StepRecord
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.tree.build import SCORE_UNIT
from support.router_stack import stack
from support.toy_cluster import run

#: Repeats itself, so that the context guesses too.
PROMPT = [5, 9, 3, 17] * 8
PARAMS: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.0}


def params(*, include_trees: bool = True, mode: str = "force") -> SamplingParams:
    return SamplingParams(**PARAMS, speculation=SpeculationOptions(mode=mode, include_trees=include_trees))


def record(frontends: list[EngineFrontend]) -> list[StepRecord]:
    """What all engines do from here on."""
    records: list[StepRecord] = []
    for frontend in frontends:
        frontend.engine.on_step = records.append
    return records


def check(deltas: list[RequestDelta], records: list[StepRecord]) -> None:
    """What was told is what the engine did, up to the precision of the wire."""
    entries = [entry for step in records for entry in step.requests]
    assert [delta.token_ids for delta in deltas] == [entry.token_ids for entry in entries]
    assert sum(delta.tree is None for delta in deltas) == 1
    for delta, entry in zip(deltas, entries, strict=True):
        if delta.tree is not None:
            told, tree = delta.tree, entry.tree
            assert (told.token_ids, told.parents) == (tree.token_ids, tree.parents)
            assert told.accepted_nodes == entry.accepted_nodes
            assert told.path_logprobs == [float(np.float32(score / SCORE_UNIT)) for score in tree.scores]
            assert len(told.sources) == tree.num_nodes
    assert max(len(delta.tree.parents) for delta in deltas if delta.tree) > 4


def test_trees_are_those_of_the_steps(frontends: list[EngineFrontend], target: Path) -> None:
    async def test() -> None:
        async with stack(frontends, target) as made:
            records = record(frontends)
            deltas = [delta async for delta in made.client.stream(PROMPT, params())]
            check(deltas[:-1], records)
            assert {source for delta in deltas if delta.tree for source in delta.tree.sources} >= {"head", "context"}
            # A request that is not asked for them has none, and its messages are those of before.
            plain = [delta async for delta in made.client.stream(PROMPT, params(include_trees=False))]
            assert all(delta.tree is None for delta in plain)
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert [token for delta in plain for token in delta.token_ids] == tokens
            await made.is_idle()

    run(test, 120)


def test_a_resumed_stream_tells_the_trees_of_who_served(frontends: list[EngineFrontend], target: Path) -> None:
    async def test() -> None:
        async with stack(frontends, target) as made:
            wanted = (await made.client.generate(PROMPT, params(include_trees=False))).token_ids
            stream = made.client.stream(PROMPT, params())
            deltas = []
            async for delta in stream:
                deltas.append(delta)
                if len(deltas) == 3:
                    for wire in made.wires:
                        wire.cut()
            assert stream.finished is not None and stream.finished.num_resumes >= 1
            assert stream.output.token_ids == wanted
            for delta in deltas[:-1]:
                if delta.tree is not None:
                    kept = [delta.tree.token_ids[node] for node in delta.tree.accepted_nodes[1:]]
                    assert kept == delta.token_ids[: delta.num_accepted]
            # The prompt was computed by both.
            assert 1 <= sum(delta.tree is None for delta in deltas[:-1]) <= 1 + stream.finished.num_resumes
            await made.is_idle()

    run(test, 120)


def test_answers_in_one_piece_refuse_them(frontends: list[EngineFrontend], target: Path) -> None:
    async def test() -> None:
        async with stack(frontends, target) as made:
            with pytest.raises(InvalidRequestError, match="only a stream tells trees"):
                await made.client.generate(PROMPT, params())
            stub = inference_pb2_grpc.JetFlowInferenceStub(made.client._channels.get(made.client.servers[0]))
            message = pb.GenerateRequest(text="x")
            message.sampling.speculation.include_trees = True
            with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.speculation\.include_trees") as caught:
                await stub.GenerateOnce(message)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test, 120)


@pytest.mark.parametrize("num_nodes", [1, 40, 512])
def test_frames_have_room_for_them(num_nodes: int) -> None:
    tree = pb.DraftTree(
        token_ids=[2**31 - 1] * num_nodes,
        parents=[num_nodes] * num_nodes,
        path_logprobs=[-1.5] * num_nodes,
        sources=[pb.GUESS_SOURCE_HEAD] * num_nodes,
        accepted_nodes=range(num_nodes),
    )
    event = rpb.ReplicaEvent(request_id="r", delta=pb.Delta(token_ids=[1], tree=tree))
    assert num_bytes_of(event) >= event.ByteSize()
