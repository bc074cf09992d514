"""The router's record of prefixes is bounded, and keeps beginnings longest."""

from __future__ import annotations

import pytest

from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.router.prefix_index import PrefixIndex

PAGE = 4


def keys(*token_ids: int) -> list[bytes]:
    return PageKeys(PAGE).extend(token_ids)


SHARED = tuple(range(8))
LONG = keys(*SHARED, *range(100, 112))


@pytest.mark.parametrize(
    "prompt, known",
    [
        pytest.param(keys(*SHARED, *range(100, 112)), 20, id="whole"),
        pytest.param(keys(*SHARED, *range(100, 104), 7, 7, 7, 7), 12, id="until-it-differs"),
        pytest.param(keys(*SHARED, *range(200, 212)), 8, id="shared-beginning"),
        pytest.param(keys(*range(100, 112)), 0, id="same-tokens-elsewhere"),
        pytest.param(keys(1, 2), 0, id="no-full-page"),
    ],
)
def test_match(prompt: list[bytes], known: int) -> None:
    index = PrefixIndex(PAGE, 100)
    index.record("a", LONG)
    assert index.match(prompt, ["a", "b"]) == {"a": known, "b": 0}


def test_the_index_is_bounded_per_replica_and_drops_ends_first() -> None:
    index = PrefixIndex(PAGE, 6)
    for salt in range(50):
        index.record("a", keys(*SHARED, *[salt] * 8))
        index.record("b", keys(*[salt] * 40))
        assert len(index) <= 12
    # The shared beginning was used with every record, the end of the one before the last only once.
    assert index.match(keys(*SHARED, *[49] * 8), ["a"]) == {"a": 16}
    assert index.match(keys(*SHARED, *[48] * 8), ["a"]) == {"a": 16}
    assert index.match(keys(*SHARED, *[47] * 8), ["a"]) == {"a": 8}
    assert index.match(keys(*[49] * 40), ["b"]) == {"b": 24}


def test_what_is_used_again_stays() -> None:
    index = PrefixIndex(PAGE, 4)
    first, second, third = (keys(*[salt] * 8) for salt in range(3))
    index.record("a", first)
    index.record("a", second)
    index.record("a", first)
    index.record("a", third)
    assert [index.match(prefix, ["a"])["a"] for prefix in (first, second, third)] == [8, 0, 8]


def test_a_lost_replica_is_forgotten() -> None:
    index = PrefixIndex(PAGE, 100)
    index.record("a", LONG)
    index.record("b", LONG)
    index.drop("a")
    index.drop("never there")
    assert index.match(LONG, ["a", "b"]) == {"a": 0, "b": 20}
    assert len(index) == 5
