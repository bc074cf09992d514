"""When a load is looked at anew: at its time, and at once where something has changed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from jetflow_cluster.engine.look_times import LookTimes
from jetflow_cluster.engine.protocols import DecodeLoad


@dataclass(frozen=True)
class _Arrived:
    arrival: int


def _load(num: int, newest: int = 0) -> DecodeLoad:
    return DecodeLoad(requests=[_Arrived(newest)], num_decoding=num, fair_nodes=8)  # type: ignore[list-item]


def _gaps(num_steps: int, *, is_seldom: bool) -> list[int]:
    """Steps between the looks at an unchanged load."""
    times, looks = LookTimes(), []
    for _ in range(num_steps):
        times.num_steps += 1
        if times.is_due:
            times.looked(_load(8), is_seldom=is_seldom)
            looks.append(times.num_steps)
    return [b - a for a, b in pairwise(looks)]


def test_the_first_step_is_looked_at() -> None:
    assert LookTimes().is_due


def test_looks_grow_rarer_where_nothing_can_have_changed() -> None:
    gaps = _gaps(600, is_seldom=True)
    assert gaps[0] < gaps[-1] <= 64
    assert gaps == sorted(gaps)
    assert len(set(_gaps(600, is_seldom=False))) == 1


def test_a_look_in_haste_makes_the_next_ones_frequent_again() -> None:
    times = LookTimes()
    for is_seldom in (True, True, True, False):
        times.looked(_load(8), is_seldom=is_seldom)
    times.num_steps += 16
    assert times.is_due


@pytest.mark.parametrize(
    ("num", "newest", "is_on", "expects_others", "expected"),
    [
        (8, 5, True, True, False),
        (6, 5, True, False, True),
        (11, 5, True, False, True),
        (11, 5, False, False, False),
        (6, 5, False, False, True),
        (8, 6, False, True, True),
        (8, 6, False, False, False),
    ],
    ids=["same", "fell", "rose", "rose-while-off", "fell-while-off", "newcomer", "newcomer-under-load"],
)
def test_news(num: int, newest: int, is_on: bool, expects_others: bool, expected: bool) -> None:
    times = LookTimes()
    times.looked(_load(8, 5), is_seldom=False)
    assert times.is_news(_load(num, newest), is_on=is_on, expects_others=expects_others) is expected


def test_a_slow_fall_is_noticed() -> None:
    """Each step down is small; what counts is the way from the last look."""
    times = LookTimes()
    times.looked(_load(10), is_seldom=True)
    news = [times.is_news(_load(num), is_on=False, expects_others=False) for num in (9, 8, 7)]
    assert news == [False, False, True]


def test_hope_has_a_time_of_its_own() -> None:
    times = LookTimes()
    assert times.takes_hope()
    assert not times.takes_hope()
    times.num_steps += 127
    assert not times.takes_hope()
    times.num_steps += 1
    assert times.takes_hope()
