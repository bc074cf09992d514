"""The target's token equals the rules written out slowly, alone and in mixed batches."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from distribution.slow_rules import slow_choice, slow_scores
from jetflow_cluster.layers.sampler import (
    SamplingRow,
    TokenCounts,
    choose_tokens,
    is_plain_greedy,
    token_logprobs,
)
from jetflow_cluster.tree.noise import gumbel_noise
from jetflow_cluster.types import SamplingParams

VOCAB = 40

OPTIONS: dict[str, dict] = {
    "plain": {},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_over_vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "top_p_tiny": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "filters": {"top_k": 12, "top_p": 0.7, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.7},
    "repetition_below_1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.4},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0, 39: 2.5}},
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


def random_case(rng: random.Random, params: SamplingParams, vocab: int = VOCAB):
    """Logits, a row for the sampler, and what the slow version needs."""
    logits = torch.tensor([rng.gauss(0, 2.5) for _ in range(vocab)], dtype=torch.float64)
    prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 9))]
    output = [rng.randrange(vocab // 2) for _ in range(rng.randint(0, 9))]
    path = [rng.choice([*output, rng.randrange(vocab)]) for _ in range(rng.randint(0, 4))]
    suppressed = tuple(rng.sample(range(vocab), rng.choice((0, 0, 3))))
    seed, position = rng.randrange(2**64), rng.randrange(5000)
    row = SamplingRow(
        params=params,
        seed=seed,
        position=position,
        counts=TokenCounts(prompt, output),
        path=path,
        suppressed_ids=suppressed,
    )
    return logits, row, slow_choice(logits, params, seed, position, prompt, output + path, suppressed)


def parameters(temperature: float, *names: str) -> SamplingParams:
    options: dict = {}
    for name in names:
        options |= OPTIONS[name]
    return SamplingParams(temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 1.8])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_equals_slow_rules(name, temperature):
    rng = random.Random(f"{name} {temperature}")
    for _ in range(12):
        logits, row, expected = random_case(rng, parameters(temperature, name))
        assert choose_tokens(logits[None], [row]) == [expected]


def test_pairs_of_options_in_one_batch_equal_slow_rules():
    rng = random.Random(1)
    cases = [
        random_case(rng, parameters(temperature, *names))
        for names in itertools.combinations(OPTIONS, 2)
        for temperature in (0.0, 0.7, 1.2)
    ]
    rng.shuffle(cases)
    logits = torch.stack([case[0] for case in cases])
    chosen = choose_tokens(logits, [case[1] for case in cases])
    assert chosen == [case[2] for case in cases]
    # And alone, so no row depends on its neighbours.
    assert chosen[::7] == [choose_tokens(case[0][None], [case[1]])[0] for case in cases[::7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_with_many_ties_equal_slow_rules(dtype):
    rng = random.Random(2)
    cases = [random_case(rng, parameters(1.0, name)) for name in OPTIONS for _ in range(4)]
    logits = (torch.stack([case[0] for case in cases]) / 2).round().to(dtype)
    for i, (_, row, _) in enumerate(cases):
        row.counts, row.path, row.suppressed_ids = TokenCounts([1], [2]), [], ()
        scores = slow_scores(logits[i], row.params, [1], [2], ())
        noise = gumbel_noise(row.seed, torch.tensor(row.position), torch.arange(VOCAB)).tolist()
        noised = [score + g for score, g in zip(scores, noise, strict=True)]
        cases[i] = (logits[i], row, noised.index(max(noised)))
    assert choose_tokens(logits, [case[1] for case in cases]) == [case[2] for case in cases]


@pytest.mark.parametrize(
    "spread, options",
    [
        pytest.param(3.0, {"top_p": 0.9}, id="nucleus"),
        pytest.param(0.01, {"top_p": 0.999}, id="nucleus-of-nearly-all"),
        pytest.param(0.5, {"top_p": 0.5, "top_k": 3000}, id="large-k"),
        pytest.param(0.0, {"top_p": 0.5}, id="all-equal"),
        pytest.param(1.0, {"top_k": 700}, id="k-beyond-the-first-guess"),
    ],
)
def test_nucleus_in_a_large_vocabulary(spread, options):
    logits = torch.randn(3, 6000, generator=torch.Generator().manual_seed(4)).double() * spread
    logits[1] *= 4.0
    params = SamplingParams(temperature=1.0, **options)
    rows = [SamplingRow(params=params, seed=r, position=9, counts=TokenCounts([0])) for r in range(3)]
    assert choose_tokens(logits, rows) == [slow_choice(logits[r], params, r, 9, [0], [], ()) for r in range(3)]


def test_plain_greedy_is_one_argmax_with_ties_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, 5.0]])
    rows = [SamplingRow(params=SamplingParams(temperature=0.0), seed=0, position=1, counts=TokenCounts([1]))] * 3
    assert choose_tokens(logits, rows) == [1, 0, 3]
    assert choose_tokens(logits[:0], []) == []


@pytest.mark.parametrize(
    "options, plain",
    [
        pytest.param({"temperature": 0.0}, True, id="greedy"),
        pytest.param({"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, True, id="filters-do-not-count"),
        pytest.param({"temperature": 0.5}, False, id="sampled"),
        pytest.param({"temperature": 0.0, "presence_penalty": 0.1}, False, id="presence"),
        pytest.param({"temperature": 0.0, "frequency_penalty": -0.1}, False, id="frequency"),
        pytest.param({"temperature": 0.0, "repetition_penalty": 1.1}, False, id="repetition"),
        pytest.param({"temperature": 0.0, "logit_bias": {1: 0.5}}, False, id="bias"),
    ],
)
def test_is_plain_greedy(options, plain):
    assert is_plain_greedy(SamplingParams(**options)) is plain


def test_logits_are_left_as_they_are():
    logits = torch.randn(4, VOCAB, dtype=torch.float64)
    before = logits.clone()
    rows = [
        SamplingRow(
            params=parameters(t, "everything"), seed=1, position=2, counts=TokenCounts([1, 2], [3]), path=[4, 4]
        )
        for t in (0.0, 1.0, 0.0, 1.0)
    ]
    choose_tokens(logits, rows)
    assert torch.equal(logits, before)


def test_wrong_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="2 rows"):
        choose_tokens(torch.zeros(2, 4), [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_path_counts_like_committed_output(temperature):
    rng = random.Random(5)
    params = parameters(temperature, "penalties")
    for _ in range(30):
        logits = torch.tensor([[rng.gauss(0, 1) for _ in range(VOCAB)]], dtype=torch.float64)
        prompt, output, path = ([rng.randrange(9) for _ in range(rng.randint(0, 6))] for _ in range(3))
        on_path = SamplingRow(params=params, seed=3, position=8, counts=TokenCounts(prompt, output), path=path)
        committed = SamplingRow(params=params, seed=3, position=8, counts=TokenCounts(prompt, output + path))
        assert choose_tokens(logits, [on_path]) == choose_tokens(logits, [committed])


def test_counts_kept_up_equal_counts_made_anew():
    rng = random.Random(6)
    prompt = [rng.randrange(200) for _ in range(50)]
    kept_up = TokenCounts(prompt, [7, 7])
    output = [7, 7]
    for _ in range(60):
        tokens = [rng.randrange(300) for _ in range(rng.randint(0, 4))]
        output += tokens
        kept_up.extend(tokens)
        if rng.random() < 0.6:
            ids, counts = kept_up.tensors(torch.device("cpu"))
            found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
            assert len(found) == len(ids)
            assert found == {token: output.count(token) for token in {*prompt, *output}}
            assert kept_up.num_in_output(7) == output.count(7)
            assert kept_up.num_in_output(299_999) == 0


def slow_logprobs(logits: torch.Tensor) -> list[float]:
    return torch.log_softmax(logits.double(), -1).tolist()


@pytest.mark.parametrize("top_n", [0, 1, 5, VOCAB, VOCAB + 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_logprobs(dtype, top_n):
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(7)).mul(2).to(dtype)
    ids = [0, 5, 5, VOCAB - 1, 8, 3]
    result = token_logprobs(logits, ids, top_n)
    assert [entry.token_id for entry in result] == ids
    for row, entry in zip(logits, result, strict=True):
        logprobs = slow_logprobs(row)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=tolerance)
        best = sorted(range(VOCAB), key=lambda token: (-row[token].item(), token))[:top_n]
        assert [token for token, _ in entry.top] == best
        assert [value for _, value in entry.top] == pytest.approx([logprobs[token] for token in best], abs=tolerance)


def test_token_logprobs_of_nothing():
    assert token_logprobs(torch.zeros(0, VOCAB), [], 3) == []
