"""The router's own record of which prefixes it sent where."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Pages that each replica is thought to have cached, by their chained keys (`cache.prefix_cache.PageKeys`).

    Approximate: it knows nothing of what other routers send, nor of what a replica evicts. Per replica the latest used
    pages are kept, the beginning of a prefix longer than its end.

    Args:
        page_size: tokens per page.
        max_pages: most pages that are kept for a replica.
    """

    def __init__(self, page_size: int, max_pages: int):
        self._page_size, self._max_pages = page_size, max_pages
        self._pages_of: dict[str, OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        return sum(len(pages) for pages in self._pages_of.values())

    def record(self, replica_id: str, keys: Sequence[bytes]) -> None:
        """Notes that a replica was given the pages of a prefix; `keys` are those of its beginning."""
        pages = self._pages_of.setdefault(replica_id, OrderedDict())
        for key in reversed(keys[: self._max_pages]):
            pages[key] = None
            pages.move_to_end(key)
        while len(pages) > self._max_pages:
            pages.popitem(last=False)

    def match(self, keys: Sequence[bytes], replica_ids: Iterable[str]) -> dict[str, int]:
        """Of each replica: how many tokens of the prefix it is thought to have."""
        return {replica_id: self._num_known(replica_id, keys) * self._page_size for replica_id in replica_ids}

    def drop(self, replica_id: str) -> None:
        """Forgets a replica; what comes back under its name has an empty cache."""
        self._pages_of.pop(replica_id, None)

    def _num_known(self, replica_id: str, keys: Sequence[bytes]) -> int:
        pages = self._pages_of.get(replica_id)
        if not pages:
            return 0
        for index, key in enumerate(keys):
            if key not in pages:
                return index
        return len(keys)
