"""The pages of one request."""

from __future__ import annotations

from jetflow_cluster.cache.page_pool import PagePool


class PageTable:
    """Maps a request's token positions to slots of its pages."""

    def __init__(self, pool: PagePool, page_size: int):
        self.page_size = page_size
        #: Page of the tokens ``[i * page_size, (i + 1) * page_size)``.
        self.pages: list[int] = []
        self._pool = pool

    def ensure(self, num_tokens: int) -> None:
        """Grows to hold `num_tokens`.

        Raises:
            OutOfPagesError: the pool cannot give the pages; nothing changed.
        """
        missing = self.num_missing(num_tokens)
        if missing > 0:
            self.pages += self._pool.allocate(missing)

    def num_missing(self, num_tokens: int) -> int:
        """Pages that `ensure` would take."""
        return max(0, -(-num_tokens // self.page_size) - len(self.pages))

    def adopt(self, pages: list[int]) -> None:
        """Takes over references of shared prefix pages; the table must be empty."""
        if self.pages:
            raise ValueError(f"the table already holds {len(self.pages)} pages")
        self.pages = list(pages)

    def shrink(self, num_tokens: int) -> None:
        """Gives back the pages behind `num_tokens`, the last first, so that a prefix is evicted behind what follows."""
        keep = -(-num_tokens // self.page_size)
        while len(self.pages) > keep:
            self._pool.release(self.pages.pop())

    def release_all(self) -> None:
        """Gives all pages back; a second call does nothing."""
        self.shrink(0)

    def slots(self, start: int, stop: int) -> list[int]:
        """Slots of the positions ``[start, stop)``."""
        size = self.page_size
        out: list[int] = []
        position = start
        while position < stop:
            index, offset = divmod(position, size)
            count = min(size - offset, stop - position)
            first = self.pages[index] * size + offset
            out += range(first, first + count)
            position += count
        return out
