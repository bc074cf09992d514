"""State of every KV page: free, used by requests, or cached for a prefix that may come again."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable


class OutOfPagesError(RuntimeError):
    """No page is free and none can be evicted."""


class PagePool:
    """Counts references of pages. ``num_free + num_used + num_cached == num_pages`` at every moment.

    A page is *used* while a request holds it, *cached* while only the prefix cache knows it, else *free*.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages = {num_pages}: must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._references = [0] * num_pages
        #: Pages without references that the prefix cache knows, the least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._known: set[int] = set()
        #: Told of a page that is taken from the prefix cache.
        self.on_evict: Callable[[int], None] = lambda page: None

    @property
    def num_free(self) -> int:
        """Pages that nobody uses or knows."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that only the prefix cache knows."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that some request holds."""
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Takes pages, low free ids first, then the least recently used cached ones.

        Raises:
            OutOfPagesError: fewer are available; nothing was taken.
        """
        if count > self.num_available:
            raise OutOfPagesError(
                f"{count} pages wanted, {self.num_free} free and {self.num_cached} cached of {self.num_pages}"
            )
        while len(self._free) < count:
            self._evict(next(iter(self._cached)))
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """One more request holds a used or cached page.

        Raises:
            ValueError: the page is free.
        """
        if self._references[page] == 0:
            if page not in self._cached:
                raise ValueError(f"page {page} is free")
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One request fewer holds the page. Of the pages of a prefix the last goes first, as eviction keeps the order.

        Raises:
            ValueError: nobody holds it.
        """
        if self._references[page] < 1:
            raise ValueError(f"page {page} is not used")
        self._references[page] -= 1
        if self._references[page] == 0:
            if page in self._known:
                self._cached[page] = None
            else:
                heapq.heappush(self._free, page)

    def know(self, page: int) -> None:
        """The prefix cache keeps a used page once no request holds it.

        Raises:
            ValueError: the page is free.
        """
        if self._references[page] == 0 and page not in self._cached:
            raise ValueError(f"page {page} is free")
        self._known.add(page)

    def forget(self, page: int) -> None:
        """The prefix cache gives a page up; it is free as soon as no request holds it."""
        self._known.discard(page)
        if page in self._cached:
            del self._cached[page]
            heapq.heappush(self._free, page)

    def _evict(self, page: int) -> None:
        self.on_evict(page)
        self.forget(page)

    def check(self) -> None:
        """Raises AssertionError when the states contradict each other."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, count in enumerate(self._references) if count > 0}
        assert len(free) == len(self._free)
        assert not (free & cached or free & used or cached & used)
        assert len(free) + len(cached) + len(used) == self.num_pages
        assert (self.num_free, self.num_cached, self.num_used) == (len(free), len(cached), len(used))
        assert cached <= self._known <= cached | used
        assert min(self._references) >= 0
