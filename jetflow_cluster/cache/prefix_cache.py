"""Finds pages of equal prefixes. Torch-free: a router hashes prompts the same way."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from jetflow_cluster.cache.page_pool import PagePool


class PageKeys:
    """Chained keys of a request's full pages: key i depends on all tokens up to the end of page i.

    Key i is the 16-byte blake2b hash of key i - 1 (of the hashed salt, for the first page) and the page's token ids
    as int32. A page is hashed once.
    """

    def __init__(self, page_size: int, salt: bytes = b""):
        self._page_size = page_size
        self._keys: list[bytes] = []
        self._seed = hashlib.blake2b(salt, digest_size=16).digest()

    def extend(self, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of all full pages of `token_ids`, which must go on from what earlier calls saw."""
        size = self._page_size
        for index in range(len(self._keys), len(token_ids) // size):
            previous = self._keys[-1] if self._keys else self._seed
            tokens = array("i", token_ids[index * size : (index + 1) * size]).tobytes()
            self._keys.append(hashlib.blake2b(previous + tokens, digest_size=16).digest())
        return self._keys[: len(token_ids) // size]


class PrefixCache:
    """Knows which page holds which prefix. A page it knows is never written to again.

    Pages that no request holds are evicted in the order in which they were released, so the last page of a prefix,
    released first, goes before those that it builds on. Where an earlier page goes all the same (another request's copy
    of it was the known one), what follows is not found until that page is known again, and is evicted in its turn.
    """

    def __init__(self, pool: PagePool, page_size: int):
        self._pool = pool
        self._page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._draft_valid: set[int] = set()
        #: Counts the times that everything known became void.
        self.epoch = 0
        pool.on_evict = self._drop

    def match(self, keys: Sequence[bytes], *, max_tokens: int, need_draft: bool) -> list[int]:
        """Pages of the longest known prefix, retained for the caller.

        Args:
            keys: of the prompt's full pages.
            max_tokens: the pages cover at most this many tokens.
            need_draft: stop at the first page without draft context.
        """
        pages: list[int] = []
        for key in keys[: max_tokens // self._page_size]:
            page = self._page_of.get(key)
            if page is None or (need_draft and page not in self._draft_valid):
                break
            pages.append(page)
        for page in pages:
            self._pool.retain(page)
        return pages

    def insert(self, key: bytes, page: int, *, draft_valid: bool) -> None:
        """Notes a full committed page that a request holds, or that its draft context is now complete.

        Of two pages with the same key the first stays, unless only the second has draft context.

        Raises:
            ValueError: the page is known by another key, or free.
        """
        if self._key_of.get(page, key) != key:
            raise ValueError(f"page {page} holds another prefix")
        known = self._page_of.get(key)
        if known is not None and known != page:
            if not draft_valid or known in self._draft_valid:
                return
            self._drop(known)
            self._pool.forget(known)
        self._pool.know(page)
        self._page_of[key] = page
        self._key_of[page] = key
        if draft_valid:
            self._draft_valid.add(page)

    def void_draft_context(self) -> None:
        """Forgets which pages have draft context, as behind the loss of whoever held it."""
        self._draft_valid.clear()

    def draft_valid_pages(self) -> list[int]:
        """Pages that are known to have draft context."""
        return sorted(self._draft_valid)

    def clear(self) -> None:
        """Forgets everything, as behind a change of weights.

        Raises:
            RuntimeError: requests hold pages; they would share what they compute from void ones.
        """
        if self._pool.num_used:
            raise RuntimeError(f"{self._pool.num_used} pages are in use; end or preempt all requests first")
        for page in list(self._key_of):
            self._drop(page)
            self._pool.forget(page)
        self.epoch += 1

    def _drop(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        self._draft_valid.discard(page)
