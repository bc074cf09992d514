"""The walk on a device against the CPU's and the definition; see `test_interpreted.py` for how these run."""

from __future__ import annotations

import random

import pytest
import torch

from jetflow_cluster.layers.walk_table import sampling_table
from jetflow_cluster.tree.noise import gumbel_noise
from jetflow_cluster.types import SamplingParams
from jetflow_kernels.accept_tree import accept_tree, accept_tree_reference, commit_slots, commit_slots_reference
from jetflow_kernels.philox_gumbel import philox_first_word, philox_gumbel
from support.walks import WalkCase, make_walks, paths_of

GREEDY = {"temperature": 0.0}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "top_p_tiny": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "filters": {"top_k": 12, "top_p": 0.7, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.7},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0, 29: 2.5}},
    "everything": {
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {0: 1.5, 7: -2.0},
    },
}


def compare(case: WalkCase, device: str, *, with_definition: bool = True) -> int:
    """The number of accepted guesses."""
    vocab_size = case.logits.shape[1]
    table = sampling_table(case.samplings, vocab_size=vocab_size, device=torch.device(device))
    out = case.buffers(table, device)
    accept_tree(case.verified(device), table, out)
    expected = case.expected()
    assert paths_of(out) == expected
    assert not out.walking.any()
    if with_definition:
        table = sampling_table(case.samplings, vocab_size=vocab_size, device=torch.device("cpu"))
        out = case.buffers(table, "cpu")
        accept_tree_reference(case.verified("cpu"), table, out)
        assert paths_of(out) == expected
    return sum(path.num_accepted for path in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("step", [0.0, 1.0], ids=["distinct", "ties"])
def test_plain_greedy(step: float, dtype: torch.dtype, device: str) -> None:
    rng = random.Random(f"{dtype} {step}")
    params = [SamplingParams(**GREEDY)] * 4
    case = make_walks(rng, params, vocab_size=1500, num_nodes=12, dtype=dtype, step=step)
    for i, s in enumerate(case.samplings):
        case.samplings[i] = type(s)(params=s.params, seed=s.seed, position=s.position, counts=s.counts)
    assert compare(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_only(dtype: torch.dtype, device: str) -> None:
    rng = random.Random(f"{dtype}")
    params = [SamplingParams(temperature=t) for t in (0.3, 0.7, 1.0, 2.0)]
    for _ in range(2):
        assert compare(make_walks(rng, params, vocab_size=1100, num_nodes=9, dtype=dtype), device)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(name: str, device: str) -> None:
    rng = random.Random(name)
    params = [SamplingParams(temperature=t, **OPTIONS[name]) for t in (0.0, 0.4, 1.0, 1.8)]
    assert compare(make_walks(rng, params, vocab_size=40, num_nodes=9), device)


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
def test_mixed_batches(step: float, device: str) -> None:
    rng = random.Random(step)
    params = [SamplingParams(temperature=rng.choice((0.0, 0.8, 1.3)), **OPTIONS[name]) for name in OPTIONS]
    assert compare(make_walks(rng, params, vocab_size=60, num_nodes=8, step=step), device)


@pytest.mark.parametrize("step", [0.0, 1.0], ids=["distinct", "ties"])
def test_filters_over_more_than_one_block(step: float, device: str) -> None:
    rng = random.Random(step)
    options = [{"top_k": 3000}, {"top_p": 0.9999}, {"top_k": 4000, "top_p": 0.9}, {"min_p": 1e-4, "top_k": 7000}]
    params = [SamplingParams(temperature=1.5, **option) for option in options]
    compare(make_walks(rng, params, vocab_size=5000, num_nodes=3, step=step), device, with_definition=False)


def test_absent_requests_and_what_is_not_a_number(device: str) -> None:
    rng = random.Random(3)
    case = make_walks(rng, [SamplingParams(temperature=0.9, top_k=3)] * 3, vocab_size=30, num_nodes=4)
    table = sampling_table(case.samplings, vocab_size=30, device=torch.device(device))
    verified = case.verified(device)
    verified.counts[1] = 0
    for each in (table, None):
        out = case.buffers(each, device)
        verified.logits[verified.first_rows[2], 7] = float("nan")
        accept_tree(verified, each, out)
        assert out.lengths[1] == 0
        assert out.token_ids[2, 0] == 7


def test_everything_barred_gives_the_first_token(device: str) -> None:
    rng = random.Random(4)
    case = make_walks(rng, [SamplingParams(temperature=0.9, top_p=0.5)], vocab_size=6, num_nodes=1)
    s = case.samplings[0]
    options = {"params": s.params, "seed": s.seed, "position": s.position, "counts": s.counts}
    case.samplings[0] = type(s)(**options, num_barred=1, barred_ids=tuple(range(6)))
    table = sampling_table(case.samplings, vocab_size=6, device=torch.device(device))
    out = case.buffers(table, device)
    accept_tree(case.verified(device), table, out)
    assert out.token_ids[0, 0] == 0


def test_slots(device: str) -> None:
    rng = random.Random(1)
    case = make_walks(rng, [SamplingParams(**GREEDY)] * 5, vocab_size=8, num_nodes=20)
    out = case.buffers(None, device)
    accept_tree(case.verified(device), None, out)
    paging = {
        "context_lens": torch.tensor([0, 5, 31, 4, 9], dtype=torch.int32, device=device),
        "page_table": torch.randperm(5 * 14, dtype=torch.int32).view(5, 14).to(device),
        "page_size": 4,
    }
    slots = [torch.full(out.nodes.shape, -5, dtype=torch.int64, device=device) for _ in range(4)]
    commit_slots(out, *slots[:2], **paging)
    commit_slots_reference(out, *slots[2:], **paging)
    assert torch.equal(slots[0], slots[2])
    assert torch.equal(slots[1], slots[3])
    assert (slots[0] >= 0).any()


@pytest.mark.parametrize(
    "seed, position, token, value",
    [
        (0, 0, 0, 0.08482025111138775),
        (2**64 - 1, 2**31, 151_935, 2.075926950523781),
        (20_260_618, 1234, 4095, -0.5902546555633533),
    ],
)
def test_noise_known_answers(seed: int, position: int, token: int, value: float, device: str) -> None:
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=device)
    noise = philox_gumbel(signed, torch.tensor([position], device=device), torch.tensor([token], device=device))
    assert noise.item() == pytest.approx(value, rel=1e-13)
    word = philox_first_word(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert int(word) == 0x6627E8D5


def test_noise_equals_the_samplers(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (7, 1), generator=generator)
    positions = torch.randint(0, 2**32, (7, 1), generator=generator)
    tokens = torch.randint(0, 2**32, (300,), generator=generator)
    noise = philox_gumbel(seeds.to(device), positions.to(device), tokens.to(device)).cpu()
    torch.testing.assert_close(noise, gumbel_noise(seeds, positions, tokens), rtol=1e-13, atol=1e-15)
