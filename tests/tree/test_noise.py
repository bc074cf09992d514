"""Philox4x32-10 against the published vectors, and the Gumbel noise that is built from it."""

from __future__ import annotations

import math

import pytest
import torch

from jetflow_cluster.tree.noise import as_signed, gumbel_noise, philox_4x32_10
from jetflow_cluster.tree.philox_cpu import philox_first_word

MASK = 0xFFFFFFFF

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_WORDS = [
    pytest.param((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
    pytest.param((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]

# Computed from the plain integer version below and pinned, so that neither can drift.
KNOWN_NOISE = [
    pytest.param(0, 0, 0, 0, 0.08482025111138775, id="zeros"),
    pytest.param(2**64 - 1, 2**31, 151_935, 0, 2.075926950523781, id="largest-seed"),
    pytest.param(20_260_618, 1234, 4095, 0, -0.5902546555633533, id="ordinary"),
    pytest.param(20_260_618, 1234, 4095, 3, 0.3677637242621784, id="sample-3"),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def plain_noise(seed: int, position: int, token: int, sample: int) -> float:
    """The noise of one token, without torch."""
    word = plain_philox((position, token, sample, 0), (seed & MASK, seed >> 32))[0]
    return -math.log(-math.log((word + 0.5) / 2**32))


@pytest.mark.parametrize("counter, key, words", KNOWN_WORDS)
@pytest.mark.parametrize("key_kind", ["int", "tensor"])
def test_philox_known_answers(counter, key, words, key_kind):
    tensors = [torch.tensor([c, 0, c]) for c in counter]
    keys = key if key_kind == "int" else [torch.tensor([k, 0, k]) for k in key]
    result = philox_4x32_10(*tensors, *keys)
    assert all(word.dtype == torch.int64 for word in result)
    assert tuple(int(word[0]) for word in result) == words
    assert tuple(int(word[2]) for word in result) == words
    assert plain_philox(counter, key) == words


def test_philox_equals_plain_integers_and_broadcasts():
    generator = torch.Generator().manual_seed(1)
    counters = torch.randint(0, 2**32, (4, 50), generator=generator)
    keys = torch.randint(0, 2**32, (2, 50), generator=generator)
    words = philox_4x32_10(*counters, *keys)
    for i in range(50):
        assert tuple(int(w[i]) for w in words) == plain_philox(
            tuple(counters[:, i].tolist()), tuple(keys[:, i].tolist())
        )
    outer = philox_4x32_10(counters[0, :3, None], counters[1, None, :5], torch.tensor(0), torch.tensor(0), 7, 9)
    assert torch.broadcast_shapes(*(word.shape for word in outer)) == (3, 5)
    for i, position in enumerate(counters[0, :3].tolist()):
        for j, token in enumerate(counters[1, :5].tolist()):
            assert int(outer[0].expand(3, 5)[i, j]) == plain_philox((position, token, 0, 0), (7, 9))[0]


@pytest.mark.parametrize(
    "c0, c1, key",
    [
        pytest.param((), (), (), id="scalar"),
        pytest.param((1,), (4099,), (), id="one-row"),
        pytest.param((5, 1), (300,), (5, 1), id="rows-and-keys"),
        pytest.param((1, 1), (1, 40_001), (1, 1), id="one-row-many-blocks"),
        pytest.param((9, 1), (5000,), (9, 1), id="many-blocks"),
        pytest.param((2, 3, 1), (2, 3, 7), (2, 1, 1), id="depths"),
        pytest.param((70_000,), (70_000,), (70_000,), id="flat-many-blocks"),
        pytest.param((0,), (0,), (0,), id="empty"),
    ],
)
def test_first_word_on_cpu_equals_definition(c0, c1, key):
    generator = torch.Generator().manual_seed(2)
    position, token, key0, key1 = (torch.randint(0, 2**32, s, generator=generator) for s in (c0, c1, key, key))
    expected = philox_4x32_10(position, token, torch.tensor(3), torch.tensor(0), key0, key1)[0]
    assert torch.equal(philox_first_word(position, token, 3, key0, key1), expected)
    expected = philox_4x32_10(position, token, torch.tensor(3), torch.tensor(0), 5, 2**32 - 1)[0]
    result = philox_first_word(position, token, 3, 5, 2**32 - 1)
    assert torch.equal(result, expected.expand_as(result))


@pytest.mark.parametrize("seed, position, token, sample, value", KNOWN_NOISE)
def test_gumbel_known_answers(seed, position, token, sample, value):
    noise = gumbel_noise(seed, torch.tensor([position]), torch.tensor([token]), sample)
    assert noise.dtype == torch.float64
    assert noise.item() == pytest.approx(value, rel=1e-13)
    assert plain_noise(seed, position, token, sample) == pytest.approx(value, rel=1e-13)


def test_noise_depends_on_seed_position_token_and_sample_only():
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    positions, tokens = torch.tensor([0, 1, 17, 40_000]), torch.arange(37)
    as_int64 = torch.tensor([as_signed(seed) for seed in seeds])
    grid = gumbel_noise(as_int64[:, None, None], positions[:, None], tokens)
    assert grid.shape == (5, 4, 37)
    assert len(set(grid.flatten().tolist())) == grid.numel()
    for i, seed in enumerate(seeds):
        for j, position in enumerate(positions.tolist()):
            alone = gumbel_noise(seed, torch.tensor(position), tokens.flip(0)).flip(0)
            torch.testing.assert_close(grid[i, j], alone, rtol=1e-14, atol=1e-15)
            one = gumbel_noise(seed, torch.tensor([position]), tokens[5:6])
            torch.testing.assert_close(grid[i, j, 5:6], one, rtol=1e-14, atol=1e-15)
    other_sample = gumbel_noise(as_int64[:, None, None], positions[:, None], tokens, 1)
    assert not (other_sample == grid).any()


def test_noise_is_finite_and_gumbel_distributed():
    noise = gumbel_noise(5, torch.arange(64)[:, None], torch.arange(512))
    assert noise.isfinite().all()
    ordered = noise.flatten().sort().values
    cdf = (-(-ordered).exp()).exp()
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    # Kolmogorov's bound at significance 1e-4 for 32768 draws.
    assert (cdf - steps).abs().max() < 2.23 / math.sqrt(len(ordered))
