"""Prefixes are found by content, held by reference, and given up oldest and deepest first."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from typing import Any

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


def test_what_follows_an_evicted_page_is_not_found_and_goes_in_its_turn() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    known = _filled(pool, cache, [1] * 4)
    # A second copy of the page is not known; what follows it is, and was used later than the known copy.
    known += _filled(pool, cache, [1] * 8)[1:]
    keys = PageKeys(SIZE).extend([1] * 8)
    pool.allocate(pool.num_free + 1)
    assert cache.match(keys, max_tokens=8, need_draft=False) == []
    assert (pool.num_free, pool.num_cached) == (0, 1)
    assert pool.allocate(1) == known[1:]
    assert (pool.num_cached, pool.num_used) == (0, 4)


def test_what_follows_an_evicted_page_is_found_once_the_page_is_known_again() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    _filled(pool, cache, [1] * 4)
    (_, follows) = _filled(pool, cache, [1] * 8)
    taken = pool.allocate(pool.num_free + 1)
    pool.release(taken[0])
    (page,) = _filled(pool, cache, [1] * 4)
    assert cache.match(PageKeys(SIZE).extend([1] * 8), max_tokens=8, need_draft=False) == [page, follows]


def test_a_page_that_lost_its_key_is_free_when_its_request_ends() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    (key,) = PageKeys(SIZE).extend([1] * 4)
    old, new = pool.allocate(2)
    cache.insert(key, old, draft_valid=False)
    cache.insert(key, new, draft_valid=True)
    assert cache.match([key], max_tokens=4, need_draft=False) == [new]
    pool.release(new)
    # Its own draft context comes too late: the other page stays.
    cache.insert(key, old, draft_valid=True)
    pool.release(old)
    assert (pool.num_free, pool.num_used) == (3, 1)
    pool.release(new)
    assert (pool.num_free, pool.num_cached) == (3, 1)


def test_draft_context_that_comes_later() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool, SIZE)
    keys = PageKeys(SIZE).extend([1] * 8)
    pages = pool.allocate(2)
    for valid, expected in ((0, 0), (1, 1), (2, 2)):
        for i, (key, page) in enumerate(zip(keys, pages, strict=True)):
            cache.insert(key, page, draft_valid=i < valid)
        found = cache.match(keys, max_tokens=8, need_draft=True)
        assert found == pages[:expected]
        for page in found:
            pool.release(page)


def test_draft_context_goes_with_the_page_s_content() -> None:
    pool = PagePool(1)
    cache = PrefixCache(pool, SIZE)
    _filled(pool, cache, [1] * 4, draft_valid=True)
    _filled(pool, cache, [2] * 4, draft_valid=False)
    assert cache.match(PageKeys(SIZE).extend([2] * 4), max_tokens=4, need_draft=True) == []


def test_a_page_with_two_prefixes_is_refused() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool, SIZE)
    (page, _) = pool.allocate(2)
    first, second = PageKeys(SIZE).extend([1] * 8)
    cache.insert(first, page, draft_valid=False)
    with pytest.raises(ValueError, match=f"page {page} holds another prefix"):
        cache.insert(second, page, draft_valid=False)


def test_clear() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    (page,) = pool.allocate(1)
    with pytest.raises(RuntimeError, match="1 pages are in use"):
        cache.clear()
    pool.release(page)
    _filled(pool, cache, [1] * 8)
    cache.clear()
    assert (cache.epoch, pool.num_free, pool.num_cached) == (1, 4, 0)
    assert cache.match(PageKeys(SIZE).extend([1] * 8), max_tokens=8, need_draft=False) == []


def test_keys_are_chained_and_incremental() -> None:
    tokens = [5, 6, 7, 8] * 3
    at_once, steps = PageKeys(SIZE), PageKeys(SIZE)
    for stop in range(len(tokens) + 1):
        assert steps.extend(tokens[:stop]) == at_once.extend(tokens)[: stop // SIZE]
    assert len(set(at_once.extend(tokens))) == 3
    assert PageKeys(SIZE, salt=b"other").extend(tokens)[0] != at_once.extend(tokens)[0]


def test_a_page_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = PageKeys(SIZE)
    hashed: list[int] = []
    real = hashlib.blake2b

    def counting(data: bytes, *, digest_size: int) -> Any:
        hashed.append(len(data))
        return real(data, digest_size=digest_size)

    monkeypatch.setattr(hashlib, "blake2b", counting)
    tokens: list[int] = []
    for token in range(40):
        tokens.append(token)
        keys.extend(tokens)
    # Of each page, its four int32 and the 16 bytes of the key before.
    assert hashed == [32] * 10


def test_the_key_of_a_page_is_fixed() -> None:
    # A router and an engine of different versions must find the same pages.
    first, second = PageKeys(2).extend([1, 2, 3, 70000])
    seed = hashlib.blake2b(b"", digest_size=16).digest()
    assert first == hashlib.blake2b(seed + struct.pack("<2i", 1, 2), digest_size=16).digest()
    assert second == hashlib.blake2b(first + struct.pack("<2i", 3, 70000), digest_size=16).digest()


def test_pages_are_found_without_torch() -> None:
    modules = "jetflow_cluster.cache.prefix_cache, jetflow_cluster.cache.page_table"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
