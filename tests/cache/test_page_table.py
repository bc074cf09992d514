"""A request's pages: grown all or nothing, given back from the end, mapped to slots."""

from __future__ import annotations

import pytest

from jetflow_cluster.cache.page_pool import OutOfPagesError, PagePool
from jetflow_cluster.cache.page_table import PageTable

SIZE = 4


@pytest.mark.parametrize(
    ("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)], ids=lambda value: str(value)
)
def test_ensure(num_tokens: int, num_pages: int) -> None:
    pool = PagePool(4)
    table = PageTable(pool, SIZE)
    for _ in range(2):
        table.ensure(num_tokens)
        assert table.pages == list(range(num_pages))
    table.ensure(0)
    assert len(table.pages) == num_pages


def test_ensure_takes_nothing_when_it_cannot_take_all() -> None:
    pool = PagePool(3)
    table = PageTable(pool, SIZE)
    table.ensure(5)
    with pytest.raises(OutOfPagesError, match="3 pages wanted, 1 free and 0 cached of 3"):
        table.ensure(20)
    assert table.pages == [0, 1]
    assert pool.num_free == 1


@pytest.mark.parametrize(
    ("num_tokens", "kept"), [(12, 3), (9, 3), (8, 2), (1, 1), (0, 0)], ids=lambda value: str(value)
)
def test_shrink(num_tokens: int, kept: int) -> None:
    pool = PagePool(4)
    table = PageTable(pool, SIZE)
    table.ensure(12)
    table.shrink(num_tokens)
    assert table.pages == list(range(kept))
    assert pool.num_free == 4 - kept


@pytest.mark.parametrize("how", ["shrink", "release_all"])
def test_the_last_page_is_given_back_first(how: str) -> None:
    pool = PagePool(3)
    table = PageTable(pool, SIZE)
    table.ensure(12)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    for page in table.pages:
        pool.know(page)
    table.release_all() if how == "release_all" else table.shrink(0)
    pool.allocate(3)
    assert evicted == [2, 1, 0]


def test_release_all_twice() -> None:
    pool = PagePool(2)
    table, other = PageTable(pool, SIZE), PageTable(pool, SIZE)
    table.ensure(4)
    table.release_all()
    other.ensure(4)
    table.release_all()
    assert (pool.num_used, other.pages) == (1, [0])


def test_shared_pages_stay_with_the_other_request() -> None:
    pool = PagePool(4)
    table, other = PageTable(pool, SIZE), PageTable(pool, SIZE)
    table.ensure(8)
    for page in table.pages:
        pool.retain(page)
    other.adopt(table.pages)
    other.ensure(9)
    other.shrink(4)
    table.release_all()
    assert (other.pages, pool.num_used) == ([0], 1)
    with pytest.raises(ValueError, match="already holds 1 pages"):
        other.adopt([3])


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 3), (3, 5), (2, 11), (11, 12)], ids=str)
def test_slots(start: int, stop: int) -> None:
    table = PageTable(PagePool(8), SIZE)
    table.pages = [6, 1, 3]
    expected = [table.pages[i // SIZE] * SIZE + i % SIZE for i in range(start, stop)]
    assert table.slots(start, stop) == expected
