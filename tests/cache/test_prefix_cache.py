"""Prefixes are found by content, held by reference, and given up oldest and deepest first."""

from __future__ import annotations

import pytest

from jetflow_cluster.cache.page_pool import PagePool
from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys, PrefixCache

SIZE = 4


def _filled(pool: PagePool, cache: PrefixCache, tokens: list[int], *, draft_valid: bool = True) -> list[int]:
    """Pages of a request that computed `tokens`, shared its full pages, and ended."""
    table = PageTable(pool, SIZE)
    table.ensure(len(tokens))
    pages = list(table.pages)
    for key, page in zip(PageKeys(SIZE).extend(tokens), pages, strict=False):
        cache.insert(key, page, draft_valid=draft_valid)
    table.release_all()
    return pages


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "expected"),
    [
        (list(range(12)), 11, 2),
        (list(range(12)), 12, 3),
        ([*range(8), 99, 99, 99, 99], 11, 2),
        ([99, *range(1, 12)], 11, 0),
        (list(range(3)), 2, 0),
    ],
    ids=["all-but-last", "all", "diverges", "differs-at-once", "short"],
)
def test_match(prompt: list[int], max_tokens: int, expected: int) -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    pages = _filled(pool, cache, list(range(12)))
    found = cache.match(PageKeys(SIZE).extend(prompt), max_tokens=max_tokens, need_draft=True)
    assert found == pages[:expected]
    assert pool.num_used == expected


def test_pages_without_draft_context_stop_a_match_that_needs_it() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    tokens = list(range(8))
    old = _filled(pool, cache, tokens, draft_valid=False)
    keys = PageKeys(SIZE).extend(tokens)
    assert cache.match(keys, max_tokens=8, need_draft=True) == []
    new = _filled(pool, cache, tokens, draft_valid=True)
    assert new != old
    assert cache.match(keys, max_tokens=8, need_draft=True) == new
    # The pages that the better ones replaced are free again.
    assert pool.num_cached == 0
    assert pool.num_free == 6


def test_the_first_of_two_equal_pages_stays() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    first = _filled(pool, cache, [1] * 4)
    held = cache.match(PageKeys(SIZE).extend([1] * 4), max_tokens=4, need_draft=False)
    _filled(pool, cache, [1] * 4)
    assert held == first
    assert cache.match(PageKeys(SIZE).extend([1] * 4), max_tokens=4, need_draft=True) == first


def test_the_least_recently_used_prefix_goes_first_its_end_before_its_beginning() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    a, b = [1] * 8, [2] * 8
    _filled(pool, cache, a)
    _filled(pool, cache, b)
    table = PageTable(pool, SIZE)
    table.adopt(cache.match(PageKeys(SIZE).extend(a), max_tokens=8, need_draft=False))
    table.release_all()
    pool.allocate(1)
    assert len(cache.match(PageKeys(SIZE).extend(b), max_tokens=8, need_draft=False)) == 1


def test_keys_are_chained_and_incremental() -> None:
    tokens = [5, 6, 7, 8] * 3
    at_once, steps = PageKeys(SIZE), PageKeys(SIZE)
    for stop in range(len(tokens) + 1):
        assert steps.extend(tokens[:stop]) == at_once.extend(tokens)[: stop // SIZE]
    assert len(set(at_once.extend(tokens))) == 3
    assert PageKeys(SIZE, salt=b"other").extend(tokens)[0] != at_once.extend(tokens)[0]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 3), (3, 5), (2, 11), (11, 12)], ids=str)
def test_slots(start: int, stop: int) -> None:
    pool = PagePool(8)
    table = PageTable(pool, SIZE)
    table.pages = [6, 1, 3]
    expected = [table.pages[i // SIZE] * SIZE + i % SIZE for i in range(start, stop)]
    assert table.slots(start, stop) == expected
