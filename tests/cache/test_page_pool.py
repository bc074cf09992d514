"""Free, used and cached pages add up through any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jetflow_cluster.cache.page_pool import OutOfPagesError, PagePool
from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys, PrefixCache

PAGE_SIZE = 4


class PoolMachine(RuleBasedStateMachine):
    """Requests that grow, share prefixes and end, over a small pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(9)
        self.cache = PrefixCache(self.pool, PAGE_SIZE)
        self.tables: list[tuple[PageTable, list[int]]] = []

    @rule(family=st.integers(0, 2), length=st.integers(1, 30), need_draft=st.booleans())
    def start(self, family: int, length: int, need_draft: bool) -> None:
        tokens = [family] * length
        table = PageTable(self.pool, PAGE_SIZE)
        keys = PageKeys(PAGE_SIZE).extend(tokens)
        pages = self.cache.match(keys, max_tokens=length - 1, need_draft=need_draft)
        assert len(pages) * PAGE_SIZE < length
        table.adopt(pages)
        before = self.pool.num_available, list(table.pages)
        try:
            table.ensure(length)
        except OutOfPagesError:
            assert (self.pool.num_available, table.pages) == before
            table.release_all()
            return
        self.tables.append((table, tokens))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 8), draft_valid=st.booleans())
    def share(self, which: int, draft_valid: bool) -> None:
        table, tokens = self.tables[which % len(self.tables)]
        for page, key in zip(table.pages, PageKeys(PAGE_SIZE).extend(tokens), strict=False):
            self.cache.insert(key, page, draft_valid=draft_valid)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 8))
    def end(self, which: int) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        table.release_all()
        table.release_all()

    @rule()
    def clear(self) -> None:
        epoch = self.cache.epoch
        self.cache.clear()
        assert self.cache.epoch == epoch + 1
        assert self.pool.num_cached == 0

    @invariant()
    def adds_up(self) -> None:
        self.pool.check()
        assert self.pool.num_free + self.pool.num_used + self.pool.num_cached == self.pool.num_pages
        assert self.pool.num_used == len({page for table, _ in self.tables for page in table.pages})


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_low_consecutive_pages_first() -> None:
    pool = PagePool(8)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    pool.release(1)
    assert pool.allocate(2) == [1, 3]


def test_nothing_is_taken_when_too_much_is_wanted() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="2 pages wanted, 1 free and 0 cached of 3"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_a_page_released_too_often() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.release(page)
    with pytest.raises(ValueError, match=f"page {page} is not used"):
        pool.release(page)


def test_a_pool_without_pages() -> None:
    with pytest.raises(ValueError, match="num_pages = 0"):
        PagePool(0)
