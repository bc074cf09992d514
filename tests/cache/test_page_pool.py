"""Free, used and cached pages add up, and a prefix is never served from another's page, through any calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jetflow_cluster.cache.page_pool import OutOfPagesError, PagePool
from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys, PrefixCache

PAGE_SIZE = 2
NUM_PAGES = 9

#: Few tokens and many of the same, so that prefixes meet, part and come again.
TOKENS = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=14)


class _Request:
    def __init__(self, pool: PagePool, token_ids: list[int], drafts: bool) -> None:
        self.token_ids = token_ids
        self.drafts = drafts
        self.table = PageTable(pool, PAGE_SIZE)
        self.keys = PageKeys(PAGE_SIZE)
        self.num_shared = 0


class PoolMachine(RuleBasedStateMachine):
    """Requests that grow, share, write, shrink and end, over a pool too small for them all.

    `written` is what each page's KV is a function of: all tokens up to the page's end, and whether the draft context
    is there too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.cache = PrefixCache(self.pool, PAGE_SIZE)
        self.requests: list[_Request] = []
        self.written: dict[int, tuple[tuple[int, ...], bool]] = {}

    def _compute(self, request: _Request, start: int) -> None:
        """Writes the pages from token `start` on; a page that another request may read is not among them."""
        for i in range(start // PAGE_SIZE, len(request.table.pages)):
            prefix = tuple(request.token_ids[: (i + 1) * PAGE_SIZE])
            page = request.table.pages[i]
            assert sum(page in other.table.pages for other in self.requests) == 1
            self.written[page] = (prefix, request.drafts)

    @rule(token_ids=TOKENS, drafts=st.booleans())
    def start(self, token_ids: list[int], drafts: bool) -> None:
        request = _Request(self.pool, token_ids, drafts)
        limit = len(token_ids) - 1
        pages = self.cache.match(request.keys.extend(token_ids), max_tokens=limit, need_draft=drafts)
        assert len(pages) * PAGE_SIZE <= limit
        for i, page in enumerate(pages):
            prefix, has_draft = self.written[page]
            assert prefix == tuple(token_ids[: (i + 1) * PAGE_SIZE])
            assert has_draft or not drafts
        request.table.adopt(pages)
        request.num_shared = len(pages)
        before = self.pool.num_available
        try:
            request.table.ensure(len(token_ids))
        except OutOfPagesError:
            assert (self.pool.num_available, request.table.pages) == (before, pages)
            request.table.release_all()
            return
        self.requests.append(request)
        self._compute(request, len(pages) * PAGE_SIZE)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 8), more=TOKENS)
    def grow(self, which: int, more: list[int]) -> None:
        request = self.requests[which % len(self.requests)]
        start = len(request.token_ids)
        try:
            request.table.ensure(start + len(more))
        except OutOfPagesError:
            return
        request.token_ids += more
        self._compute(request, start)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 8), scratch=st.integers(1, 6))
    def guess(self, which: int, scratch: int) -> None:
        """A tree in tail pages that goes again."""
        request = self.requests[which % len(self.requests)]
        before = list(request.table.pages)
        try:
            request.table.ensure(len(request.token_ids) + scratch)
        except OutOfPagesError:
            assert request.table.pages == before
            return
        for page in request.table.pages[len(before) :]:
            self.written[page] = ((), False)
        request.table.shrink(len(request.token_ids))
        assert request.table.pages == before

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 8))
    def share(self, which: int) -> None:
        request = self.requests[which % len(self.requests)]
        keys = request.keys.extend(request.token_ids)
        for i in range(request.num_shared, len(keys)):
            self.cache.insert(keys[i], request.table.pages[i], draft_valid=request.drafts)
        request.num_shared = len(keys)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 8))
    def draft_context_comes_later(self, which: int) -> None:
        request = self.requests[which % len(self.requests)]
        if request.drafts:
            return
        for i, key in enumerate(request.keys.extend(request.token_ids)):
            page = request.table.pages[i]
            self.written[page] = (self.written[page][0], True)
            self.cache.insert(key, page, draft_valid=True)
        request.drafts = True
        request.num_shared = len(request.token_ids) // PAGE_SIZE

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 8))
    def end(self, which: int) -> None:
        request = self.requests.pop(which % len(self.requests))
        request.table.release_all()
        request.table.release_all()

    @rule()
    def clear(self) -> None:
        epoch, num_used = self.cache.epoch, self.pool.num_used
        if num_used:
            with pytest.raises(RuntimeError, match=f"{num_used} pages are in use"):
                self.cache.clear()
            return
        self.cache.clear()
        assert (self.cache.epoch, self.pool.num_free) == (epoch + 1, NUM_PAGES)

    @invariant()
    def adds_up(self) -> None:
        self.pool.check()
        assert self.pool.num_free + self.pool.num_used + self.pool.num_cached == NUM_PAGES
        assert self.pool.num_used == len({page for request in self.requests for page in request.table.pages})

    def teardown(self) -> None:
        """Whatever came before: with no request nothing is used, and every page can be had."""
        for request in self.requests:
            request.table.release_all()
        self.pool.check()
        assert self.pool.num_used == 0
        assert sorted(self.pool.allocate(NUM_PAGES)) == list(range(NUM_PAGES))


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
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


def test_free_pages_go_before_cached_ones() -> None:
    pool = PagePool(3)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    (page,) = pool.allocate(1)
    pool.know(page)
    pool.release(page)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 1, 0)
    pool.allocate(2)
    assert evicted == []
    assert pool.allocate(1) == [page]
    assert evicted == [page]


@pytest.mark.parametrize("call", ["release", "retain", "know"])
def test_a_free_page_is_nobody_s(call: str) -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.release(page)
    with pytest.raises(ValueError, match=f"page {page} is"):
        getattr(pool, call)(page)
    pool.check()


def test_a_pool_without_pages() -> None:
    with pytest.raises(ValueError, match="num_pages = 0"):
        PagePool(0)
