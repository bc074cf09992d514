"""What a client of a router sees: whole streams, whatever replicas do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from jetflow_cluster.rpc.errors import InvalidFieldsError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from support.toy_cluster import PROMPT, Seen, cluster, failure, request, run, stream, until
from support.toy_replica import Fault, expected, save_tokenizer, tokenizer, toy_tokens

SAMPLING = {
    "plain": {},
    "unseeded": {"seed": None},
    "logprobs": {"logprobs": 0},
    "stop": {"stop": ["€", ". .", "zz"], "max_tokens": 120, "seed": 5},
    "prior": {"prior_output_token_ids": toy_tokens(PROMPT, 7, 5)},
}


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_stream_is_what_the_model_says(sampling: str) -> None:
    async def test() -> None:
        async with cluster() as made:
            message = request(**SAMPLING[sampling])
            seen = await stream(made.stub, message)
            seen.check(message)
            assert seen.started is not None and seen.finished is not None
            router, replica, _ = seen.started.request_id.split(":")
            assert (router, replica) == ("router-0", seen.started.replica_id)
            assert (seen.started.model, seen.started.prompt_tokens) == ("toy", len(PROMPT))
            assert not seen.started.prompt_token_ids and seen.finished.num_resumes == 0
            timing = seen.finished.timing
            assert 0 < timing.time_to_first_token_s <= timing.total_s
            once = await made.stub.GenerateOnce(message)
            if message.sampling.HasField("seed"):
                assert (list(once.token_ids), once.text) == (seen.token_ids, seen.text)
                assert len(once.logprobs) == (len(once.token_ids) if sampling == "logprobs" else 0)
            assert once.finished.usage == seen.finished.usage
            await made.is_clean()

    run(test)


FAULTS = ["break", "draining", "internal", "flush", "gap", "repeat"]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_request_goes_on_where_a_replica_left_it(kind: str, sampling: str) -> None:
    async def test() -> None:
        async with cluster(max_fruitless_attempts=8) as made:
            for after in (0, 1, 4, 7):
                # Whichever replica gets it first, and the one after it.
                for replica in made.replicas:
                    replica.faults.append(Fault(kind, after))
                message = request(**SAMPLING[sampling])
                seen = await stream(made.stub, message)
                seen.check(message)
                assert seen.finished is not None
                assert seen.finished.num_resumes >= (after > 0)
                for replica in made.replicas:
                    replica.faults.clear()
                await made.is_up()
            await made.is_clean()

    run(test)


@pytest.mark.parametrize("sampling", ["plain", "logprobs", "prior"])
def test_only_the_end_was_lost(sampling: str) -> None:
    async def test() -> None:
        async with cluster() as made:
            for replica in made.replicas:
                replica.faults.append(Fault("lose"))
            message = request(**SAMPLING[sampling])
            seen = await stream(made.stub, message)
            seen.check(message)
            assert seen.finished is not None and seen.finished.num_resumes == 2
            submits = [submit for replica in made.replicas for submit in replica.submits]
            assert max(len(submit.sampling.prior_output_token_ids) for submit in submits) == 23

    run(test)


def test_many_streams_outlive_a_killed_replica() -> None:
    async def test() -> None:
        async with cluster(replica={"step_s": 0.005}) as made:
            messages = [request(max_tokens=90, seed=seed) for seed in range(16)]
            streams = [stream(made.stub, message) for message in messages]

            async def kill() -> None:
                await until(lambda: len(made.replicas[0].running) >= 4 and len(made.replicas[1].running) >= 4)
                await made.replicas[0].stop()

            *seen, _ = await asyncio.gather(*streams, kill())
            for one, message in zip(seen, messages, strict=True):
                one.check(message)
            assert sum(one.finished.num_resumes for one in seen) >= 4
            await made.is_clean()

    run(test)


@pytest.mark.parametrize(
    "kind, after, code",
    [
        pytest.param("internal", 0, grpc.StatusCode.INTERNAL, id="internal-before-a-token"),
        pytest.param("gap", 0, grpc.StatusCode.UNAVAILABLE, id="wrong-before-a-token"),
        pytest.param("internal", 4, grpc.StatusCode.ABORTED, id="internal-behind-tokens"),
    ],
)
def test_a_request_that_every_replica_fails_on_fails(kind: str, after: int, code: grpc.StatusCode) -> None:
    async def test() -> None:
        async with cluster(max_fruitless_attempts=2) as made:
            for replica in made.replicas:
                replica.faults.extend([Fault(kind, after), *[Fault(kind)] * 6])
            # Each replica gets on once.
            error = await failure(stream(made.stub, request(max_tokens=30)))
            assert error.code is code
            if code is grpc.StatusCode.ABORTED:
                assert error.last_offset is not None and error.last_offset >= 3
            await made.is_clean()

    run(test)


@pytest.mark.parametrize("num_deltas", [0, 1, 5])
def test_no_replica_is_left(num_deltas: int) -> None:
    async def test() -> None:
        async with cluster(1, replica={"step_s": 0.02}, resume_timeout_s=0.2) as made:
            call = made.stub.GenerateStream(request(max_tokens=200))
            seen = Seen()

            async def follow() -> None:
                async for event in call:
                    seen.take(event)
                    if len(seen.deltas) == num_deltas:
                        await made.replicas[0].stop()

            error = await failure(follow())
            if seen.deltas:
                assert (error.code, error.last_offset) == (grpc.StatusCode.ABORTED, len(seen.token_ids))
            else:
                assert error.code is grpc.StatusCode.UNAVAILABLE
            assert seen.token_ids == toy_tokens(PROMPT, 7, len(seen.token_ids))

    run(test)


def test_without_any_replica_a_request_is_unavailable() -> None:
    async def test() -> None:
        async with cluster(0, unavailable_after_s=0.05) as made:
            for call in (
                made.stub.GenerateOnce(request()),
                made.stub.GetModelCard(pb.GetModelCardRequest()),
                made.stub.Tokenize(pb.TokenizeRequest(text="a")),
            ):
                error = await failure(call)
                assert error.code is grpc.StatusCode.UNAVAILABLE and error.retry_after_s is not None

    run(test)


def test_a_refused_request_names_the_field() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            made.replicas[0].faults.append(Fault("invalid"))
            with pytest.raises(InvalidFieldsError, match="at most 6") as info:
                await stream(made.stub, request())
            assert info.value.field == "prompt"
            assert len(made.replicas[0].submits) == 1
            await made.is_clean()

    run(test)


@pytest.mark.parametrize(
    "change, field",
    [
        pytest.param({"temperature": -1.0}, "sampling.temperature", id="sampling"),
        pytest.param({"request_id": "é"}, "request_id", id="id"),
        pytest.param({"timeout_ms": 0}, "timeout_ms", id="timeout"),
    ],
)
def test_what_is_wrong_by_itself_reaches_no_replica(change: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with cluster(1) as made:
            with pytest.raises(InvalidFieldsError) as info:
                await stream(made.stub, request(**change))
            assert info.value.field == field
            assert (await failure(stream(made.stub, request(model="other")))).code is grpc.StatusCode.NOT_FOUND
            assert made.replicas[0].submits == []

    run(test)


def test_a_request_id_is_unique_while_it_runs() -> None:
    async def test() -> None:
        async with cluster(1, replica={"step_s": 0.01}) as made:
            call = made.stub.GenerateStream(request(request_id="mine", max_tokens=400))
            event = await call.read()
            assert event.started.request_id == "mine"
            with pytest.raises(InvalidFieldsError, match="unique"):
                await stream(made.stub, request(request_id="mine"))
            call.cancel()
            await made.is_clean()
            (await stream(made.stub, request(request_id="mine"))).check(request())

    run(test)


@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize("text", ["def é(€):", "x" * 5000], ids=["short", "long"])
def test_text_and_conversations_are_encoded(has_tokenizer: bool, text: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(1, tokenizer=str(save_tokenizer(tmp_path)) if has_tokenizer else None) as made:
            ids = list(tokenizer().encode(text).ids)
            message = request()
            message.text = text
            seen = await stream(made.stub, message)
            seen.check(message, ids)
            assert seen.started is not None and list(seen.started.prompt_token_ids) == ids

            chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=text)])
            message.chat.CopyFrom(chat)
            chat_ids = list(tokenizer().encode(f"<user>{text}").ids)
            (await stream(made.stub, message)).check(message, chat_ids)

            tokens = await made.stub.Tokenize(pb.TokenizeRequest(text=text))
            assert list(tokens.token_ids) == ids
            tokens = await made.stub.Tokenize(pb.TokenizeRequest(chat=chat))
            assert list(tokens.token_ids) == chat_ids
            if has_tokenizer:
                answer = await made.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
                assert answer.text == text
            else:
                with pytest.raises(grpc.RpcError, match="no tokenizer"):
                    await made.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))

    run(test)


def test_card_and_load() -> None:
    async def test() -> None:
        async with cluster(2) as made:
            assert (await made.stub.GetModelCard(pb.GetModelCardRequest())).model == "toy"
            assert (await made.stub.GetModelCard(pb.GetModelCardRequest(model="toy"))).vocab_size == 256
            error = await failure(made.stub.GetModelCard(pb.GetModelCardRequest(model="other")))
            assert error.code is grpc.StatusCode.NOT_FOUND
            load = await made.stub.GetServerLoad(pb.GetServerLoadRequest())
            assert (load.router_id, load.num_queued) == ("router-0", 0)
            assert {replica.replica_id: replica.healthy for replica in load.replicas} == {
                "replica-0": True,
                "replica-1": True,
            }

    run(test)


def test_expected_text_is_cut_before_the_stop() -> None:
    whole = expected(PROMPT, 5, 120, ("€", ". .", "zz"))
    assert whole.finish_reason == pb.FINISH_REASON_STOP and whole.stop not in whole.text
