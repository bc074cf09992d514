"""The queue: order, bounds, refusals, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest

from jetflow_cluster.router.admission import Admission, Waiter
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.rpc.errors import StatusError

CONFIG = RouterConfig(max_queued_tokens=100, prior_tokens_per_s=10.0, unavailable_after_s=0.05, resume_timeout_s=0.05)


@dataclass
class Seat:
    """A place that tells when it is free again."""

    room: Room
    name: str

    def release(self) -> None:
        self.room.free += 1
        self.room.released.append(self.name)
        self.room.admission.freed(0)


@dataclass
class Room:
    """So many places, given in the order of asking."""

    free: int
    admission: Admission = field(init=False)
    now: float = 0.0
    given: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(CONFIG, clock=lambda: self.now)
        self.admission.set_serving(1)

    def place(self, name: str) -> Callable[[], Seat | None]:
        def take() -> Seat | None:
            if self.free == 0:
                return None
            self.free -= 1
            self.given.append(name)
            return Seat(self, name)

        return take

    def enter(self, name: str, num_tokens: int = 10, deadline: float | None = None) -> Waiter[Seat]:
        return self.admission.enter(num_tokens, self.place(name), deadline=deadline)

    def enter_again(self, name: str) -> Waiter[Seat]:
        return self.admission.enter_again(10, self.place(name))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


def refusal(call: Callable[[], object]) -> StatusError:
    with pytest.raises(StatusError) as info:
        call()
    return info.value


def test_places_are_given_in_the_order_of_arrival_and_to_begun_ones_first() -> None:
    async def test() -> None:
        room = Room(free=1)
        first = await room.enter("first").wait()
        tasks = [asyncio.create_task(room.enter(name).wait()) for name in "abc"]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(room.enter_again("begun").wait()))
        await asyncio.sleep(0)
        assert room.admission.num_waiting == 4 and room.admission.num_tokens == 30
        first.release()
        for _ in range(4):
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            tasks = list(pending)
            for task in done:
                task.result().release()
        assert room.given == ["first", "begun", "a", "b", "c"]
        assert (room.admission.num_waiting, room.admission.num_tokens, room.free) == (0, 0, 1)

    run(test)


def test_a_newcomer_does_not_overtake() -> None:
    async def test() -> None:
        room = Room(free=0)
        room.enter("waits")
        room.free = 1
        # There is room now, but someone came before.
        room.enter("newcomer")
        room.admission.pump()
        assert room.given == ["waits"]

    run(test)


def test_a_full_queue_refuses_with_a_hint() -> None:
    async def test() -> None:
        room = Room(free=0)
        for index in range(10):
            room.enter(f"{index}")
        error = refusal(lambda: room.enter("eleventh", 1))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s == pytest.approx(10.0)
        room.enter_again("begun, and never refused for the number of others")
        assert room.admission.num_waiting == 11

    run(test)


def test_a_request_longer_than_the_queue_may_wait_alone() -> None:
    async def test() -> None:
        room = Room(free=0)
        room.enter("long", 1_000)
        assert refusal(lambda: room.enter("next", 1)).code is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


@pytest.mark.parametrize("deadline, refused", [(3.9, True), (4.1, False), (None, False)])
def test_a_deadline_that_the_queue_ahead_does_not_allow_is_refused_at_once(
    deadline: float | None, refused: bool
) -> None:
    async def test() -> None:
        room = Room(free=0)
        room.enter("ahead", 40)
        if refused:
            assert refusal(lambda: room.enter("late", deadline=deadline)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            room.enter("in time", deadline=deadline)
        assert room.admission.num_waiting == 2 - refused

    run(test)


def test_the_estimate_follows_what_is_measured_under_load() -> None:
    async def test() -> None:
        room = Room(free=0)
        room.enter("ahead", 40)
        for _ in range(40):
            room.now += 0.25
            room.admission.freed(250)
        assert room.admission.rate.tokens_per_s == pytest.approx(1000, rel=0.05)
        room.enter("in time", deadline=room.now + 0.1)
        before = room.admission.rate.tokens_per_s
        room.free = 2
        room.admission.pump()
        for _ in range(40):
            # Nothing waits: that little is done says nothing of what could be.
            room.now += 0.25
            room.admission.freed(1)
        assert room.admission.rate.tokens_per_s == before
        room.admission.set_serving(3)
        assert room.admission.rate.tokens_per_s == pytest.approx(3 * before)

    run(test)


@pytest.mark.parametrize("moment", ["waiting", "placed"])
def test_cancelled_requests_leave_no_trace(moment: str) -> None:
    async def test() -> None:
        room = Room(free=0)
        tasks = [asyncio.create_task(room.enter(name).wait()) for name in "abc"]
        await asyncio.sleep(0)
        if moment == "placed":
            # The place is given, and the task has not run since.
            room.free = 1
            room.admission.pump()
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        if moment == "waiting":
            room.free = 1
            room.admission.pump()
        assert (await tasks[1]).name == "b"
        assert room.released == (["a"] if moment == "placed" else [])
        tasks[2].cancel()
        await asyncio.wait(tasks[2:])
        assert (room.admission.num_waiting, room.admission.num_tokens, room.free) == (0, 0, 0)

    run(test)


def test_a_cancelled_head_lets_the_next_one_go() -> None:
    async def test() -> None:
        room = Room(free=0)
        large = asyncio.create_task(room.admission.enter(90, lambda: None).wait())
        await asyncio.sleep(0)
        small = asyncio.create_task(room.enter("small").wait())
        await asyncio.sleep(0)
        room.free = 1
        room.admission.pump()
        assert room.given == [], "no one overtakes"
        large.cancel()
        assert (await small).name == "small"

    run(test)


def test_what_cannot_be_placed_at_all_is_refused_and_holds_up_nobody() -> None:
    async def test() -> None:
        def unknown() -> Seat | None:
            if room.free:
                raise StatusError.not_found("no such model")
            return None

        room = Room(free=0)
        bad = room.admission.enter(10, unknown)
        good = room.enter("good")
        room.free = 1
        room.admission.pump()
        with pytest.raises(StatusError, match="NOT_FOUND"):
            await bad.wait()
        assert (await good.wait()).name == "good"

    run(test)


@pytest.mark.parametrize("kind", ["arrives in an outage", "outage while waiting", "begun"])
def test_without_replicas_requests_wait_for_a_limited_time(kind: str) -> None:
    async def test() -> None:
        room = Room(free=0)
        if kind == "arrives in an outage":
            room.admission.set_serving(0)
        waiter = room.enter_again("begun") if kind == "begun" else room.enter("new")
        room.admission.set_serving(0)
        with pytest.raises(StatusError) as info:
            await waiter.wait()
        assert info.value.code is grpc.StatusCode.UNAVAILABLE
        assert info.value.retry_after_s is not None
        assert room.admission.num_waiting == 0

    run(test)


def test_a_replica_that_comes_back_in_time_ends_the_wait() -> None:
    async def test() -> None:
        room = Room(free=0)
        room.admission.set_serving(0)
        waiter = room.enter("new")
        room.free = 1
        room.admission.set_serving(1)
        assert (await waiter.wait()).name == "new"
        other = room.enter("second")
        room.admission.set_serving(0)
        room.admission.set_serving(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.15):
                await other.wait()
        assert room.admission.num_waiting == 0

    run(test)
