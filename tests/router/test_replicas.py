"""Links to replicas: quarantine, probing, silence, membership, and what requests see of it."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from support.toy_cluster import PROMPT, Seen, cluster, failure, request, run, stream, until
from support.toy_replica import Fault, ToyReplica, toy_tokens

SLOW = {"step_s": 0.01}
ARITHMETICS = ("float32", "bfloat16")


def healthy(made: object) -> set[str]:
    """Replicas that the first router takes for healthy."""
    load = made.routers[0].server.load()  # type: ignore[attr-defined]
    return {replica.replica_id for replica in load.replicas if replica.healthy}


def test_silence_is_a_loss_and_requests_go_on() -> None:
    async def test() -> None:
        async with cluster(silence_s=1.0) as made:
            for replica in made.replicas:
                replica.faults.append(Fault("freeze", 4))
            first, second = made.replicas
            began = time.monotonic()
            message = request(60)
            running = asyncio.create_task(stream(made.stub, message))
            await until(lambda: first.frozen or second.frozen)
            frozen, other = (first, second) if first.frozen else (second, first)
            other.faults.clear()
            await until(lambda: healthy(made) == {other.replica_id})
            # A look counts whole, though the last frame may have come within it.
            assert time.monotonic() - began >= 0.9
            seen = await running
            seen.check(message)
            assert seen.finished is not None and seen.finished.num_resumes >= 1
            frozen.frozen = False
            await made.is_up()
            await made.is_clean()

    run(test)


def test_heartbeats_keep_a_link_without_requests() -> None:
    async def test() -> None:
        async with cluster(1, silence_s=1.0, replica={"heartbeat_s": 0.1}) as made:
            await asyncio.sleep(1.5)
            assert healthy(made) == {"replica-0"} and len(made.replicas[0].hellos) == 1

    run(test)


def test_an_error_is_a_loss_at_once_and_probing_finds_the_replica_again() -> None:
    async def test() -> None:
        async with cluster(1, max_probe_pause_s=0.2) as made:
            replica = made.replicas[0]
            assert (replica.hellos[0].router_id, replica.hellos[0].grace_ms) == ("router-0", 0)
            replica.break_streams()
            await until(lambda: len(replica.hellos) == 2)
            await made.is_up()
            await replica.stop()
            await until(lambda: not healthy(made))
            assert not made.routers[0].server.is_serving
            await asyncio.sleep(0.5)
            await replica.start()
            await made.is_up()
            assert made.routers[0].server.is_serving
            message = request()
            (await stream(made.stub, message)).check(message)

    run(test)


@pytest.mark.parametrize("state", ["draining", "unhealthy"])
def test_a_replica_that_says_so_gets_nothing_new(state: str) -> None:
    async def test() -> None:
        async with cluster(replica=SLOW) as made:
            first, second = made.replicas
            runs = [asyncio.create_task(stream(made.stub, request(100, seed=seed))) for seed in range(6)]
            await until(lambda: len(first.running) == 3 and len(second.running) == 3)
            first.draining, first.healthy = state == "draining", state != "unhealthy"
            await made.is_up(1)
            for seed in range(5):
                message = request(8, seed=seed)
                (await stream(made.stub, message)).check(message)
            assert len(first.submits) == 3
            for seed, seen in enumerate(await asyncio.gather(*runs)):
                seen.check(request(100, seed=seed))
                assert seen.finished is not None and seen.finished.num_resumes == 0
            first.draining, first.healthy = False, True
            await made.is_up()

    run(test)


def test_a_replica_that_leaves_finishes_what_it_runs() -> None:
    async def test() -> None:
        async with cluster(replica=SLOW) as made:
            first, second = made.replicas
            runs = [asyncio.create_task(stream(made.stub, request(100, seed=seed))) for seed in range(6)]
            await until(lambda: len(first.running) == 3 and len(second.running) == 3)
            made.tell([second])
            assert healthy(made) == {"replica-1"}
            message = request(8)
            (await stream(made.stub, message)).check(message)
            assert len(first.submits) == 3
            for seed, seen in enumerate(await asyncio.gather(*runs)):
                seen.check(request(100, seed=seed))
                assert seen.finished is not None and seen.finished.num_resumes == 0
            await until(lambda: not first._streams)
            await made.is_clean()

    run(test)


def test_a_replica_that_leaves_too_slowly_hands_over() -> None:
    async def test() -> None:
        async with cluster(replica=SLOW, drain_timeout_s=0.1) as made:
            runs = [asyncio.create_task(stream(made.stub, request(200, seed=seed))) for seed in range(4)]
            await until(lambda: len(made.replicas[0].running) == 2)
            made.tell(made.replicas[1:])
            for seed, seen in enumerate(await asyncio.gather(*runs)):
                seen.check(request(200, seed=seed))
            assert not made.replicas[0].running
            await made.is_clean()

    run(test)


def test_a_replica_that_is_told_of_again_keeps_its_requests() -> None:
    async def test() -> None:
        async with cluster(replica=SLOW) as made:
            runs = [asyncio.create_task(stream(made.stub, request(100, seed=seed))) for seed in range(4)]
            await until(lambda: len(made.replicas[0].running) == 2)
            made.tell(made.replicas[1:])
            assert healthy(made) == {"replica-1"}
            made.tell(made.replicas)
            assert healthy(made) == {"replica-0", "replica-1"}
            for seed, seen in enumerate(await asyncio.gather(*runs)):
                seen.check(request(100, seed=seed))
                assert seen.finished is not None and seen.finished.num_resumes == 0
            assert len(made.replicas[0].hellos) == 1
            await made.is_clean()

    run(test)


def test_a_name_may_come_back_with_another_address() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            successor = await ToyReplica("replica-0").start()
            made.tell([successor])
            await until(lambda: successor.hellos)
            await made.is_up()
            message = request()
            (await stream(made.stub, message)).check(message)
            assert successor.submits and not made.replicas[0].submits
            await made.routers[0].server.stop()
            await successor.stop()

    run(test)


@pytest.mark.parametrize("addresses", [{"a:b": "host:1"}, {"": "host:1"}, {"a": ""}, {"x" * 49: "host:1"}])
def test_names_that_cannot_be_are_refused(addresses: dict[str, str]) -> None:
    async def test() -> None:
        async with cluster(1) as made:
            with pytest.raises(ValueError, match="must be"):
                made.routers[0].server.set_replicas(addresses)
            assert healthy(made) == {"replica-0"}

    run(test)


def test_prompts_follow_their_prefix_and_sessions_their_replica() -> None:
    async def test() -> None:
        async with cluster(3, prefix_page_size=4) as made:
            where: dict[int, set[str]] = {}
            for turn in range(3):
                for topic in range(6):
                    message = request(4, seed=turn)
                    message.token_ids.ids[:] = [topic] * 12 + [100 + turn] * (2 + 4 * turn)
                    seen = await stream(made.stub, message)
                    assert seen.started is not None
                    where.setdefault(topic, set()).add(seen.started.replica_id)
            assert all(len(found) == 1 for found in where.values())

            sessions: dict[str, set[str]] = {}
            for turn in range(3):
                for session in "abcdef":
                    seen = await stream(made.stub, request(4, seed=turn, session_id=session))
                    assert seen.started is not None
                    sessions.setdefault(session, set()).add(seen.started.replica_id)
            assert all(len(found) == 1 for found in sessions.values())
            assert len(set.union(*sessions.values())) > 1

    run(test)


def test_a_conversation_follows_its_own_output() -> None:
    async def test() -> None:
        async with cluster(2, prefix_page_size=4, load_bound_tokens=10_000) as made:
            first = await stream(made.stub, request(40))
            assert first.started is not None
            home = first.started.replica_id
            other = next(replica for replica in made.replicas if replica.replica_id != home)
            # The other one has the prompt too, but not what was answered.
            follow = request(8, seed=9)
            follow.token_ids.ids[:] = [*PROMPT, *first.token_ids, 1, 2, 3]
            made.routers[0].server._dispatcher.replicas.prefixes.record(other.replica_id, _keys(PROMPT))
            seen: Seen = await stream(made.stub, follow)
            assert seen.started is not None and seen.started.replica_id == home

    run(test)


def _keys(token_ids: list[int]) -> list[bytes]:
    from jetflow_cluster.cache.prefix_cache import PageKeys

    return PageKeys(4).extend(token_ids)


def test_load_of_others_counts() -> None:
    async def test() -> None:
        async with cluster(2) as made:
            made.replicas[0].outstanding_tokens = 5_000
            server = made.routers[0].server
            await until(lambda: max(load.outstanding_tokens for load in server.load().replicas) == 5_000)
            for seed in range(4):
                seen = await stream(made.stub, request(seed=seed))
                assert seen.started is not None and seen.started.replica_id == "replica-1"
            made.replicas[0].outstanding_tokens = 0

    run(test)


@pytest.mark.parametrize("after", [0, 4], ids=["before a token", "after tokens"])
def test_a_stream_goes_on_only_where_it_is_computed_alike(after: int) -> None:
    """Both replicas break; what has tokens is not given to the one that computes otherwise."""

    async def test() -> None:
        async with cluster(replica=SLOW, arithmetics=ARITHMETICS) as made:
            message = request(30, seed=7)
            for replica in made.replicas:
                replica.faults.append(Fault("break", after))
            if not after:
                seen = await stream(made.stub, message)
                seen.check(message)
                assert seen.started is not None and seen.started.arithmetic in ARITHMETICS
                return
            call = asyncio.create_task(stream(made.stub, message))
            await until(lambda: made.num_submits)
            first = next(replica for replica in made.replicas if replica.submits)
            # Gone for good: the other one is all that is known.
            await until(lambda: not healthy(made) >= {first.replica_id})
            made.tell([replica for replica in made.replicas if replica is not first])
            error = await failure(call)
            assert error.code is grpc.StatusCode.ABORTED and error.last_offset is not None and error.last_offset >= 3
            other = next(replica for replica in made.replicas if replica is not first)
            assert f"tokens computed in {first.arithmetic}: they compute in {other.arithmetic}" in str(error)
            assert not other.submits

    run(test)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_prior_tokens_are_taken_by_a_replica_that_computes_alike(arithmetic: str) -> None:
    async def test() -> None:
        async with cluster(arithmetics=ARITHMETICS) as made:
            prior = toy_tokens(PROMPT, 7, 6)
            message = request(20, seed=7, prior_output_token_ids=prior, arithmetic=arithmetic)
            for _ in range(3):
                (await stream(made.stub, message)).check(message)
            took = [replica.arithmetic for replica in made.replicas if replica.submits]
            assert took == [arithmetic]
            message.arithmetic = "float64"
            error = await failure(stream(made.stub, message))
            assert (error.code, error.last_offset) == (grpc.StatusCode.ABORTED, 6)

    run(test)
