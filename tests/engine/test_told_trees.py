"""Trees that a request asks to be told are those of its steps, and asking for them changes no token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jetflow_cluster import LLM, GuessSource, InvalidRequestError, RequestDelta, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.protocols import StepRecord
from jetflow_cluster.engine.told_tree import told_tree
from jetflow_cluster.tree.build import SCORE_UNIT
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.lookup import ContextGuess
from support.adversaries import NoDrafter
from support.static_engines import make_static

A, H, C, B = GuessSource.ANCHOR, GuessSource.HEAD, GuessSource.CONTEXT, GuessSource.HEAD_AND_CONTEXT
OPTIONS: dict[str, Any] = {"dtype": "float64", "num_pages": 96, "page_size": 8, "tree_nodes": {1: 12}}
#: The first repeats itself, and goes on to do so; the last is one token.
PROMPTS = [[5, 9, 3, 17] * 9, list(range(30)), [7]]
FORCE = SpeculationOptions(mode="force", include_trees=True)
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "seed": 5},
    "stop": {"temperature": 0.0, "stop_token_ids": [17]},
    "off": {"temperature": 0.0, "speculation": SpeculationOptions(mode="off", include_trees=True)},
}


def params_of(sampling: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 40, "ignore_eos": True, "speculation": FORCE} | sampling))


def run(llm: LLM, params: SamplingParams) -> tuple[list[RequestDelta], list[StepRecord]]:
    """What requests were told, and what the engine recorded, of the prompts in one batch."""
    deltas: list[RequestDelta] = []
    records: list[StepRecord] = []
    llm.engine.on_step = records.append
    try:
        llm.generate(PROMPTS, params, on_delta=deltas.append)
    finally:
        llm.engine.on_step = None
    return deltas, records


@pytest.fixture(scope="module")
def eager(tiny_target_dir: Path, tiny_head_dir: Path) -> LLM:
    return LLM(str(tiny_target_dir), str(tiny_head_dir), **OPTIONS)


@pytest.fixture(scope="module")
def static(tiny_target_dir: Path, tiny_head_dir: Path) -> LLM:
    llm = LLM(str(tiny_target_dir), str(tiny_head_dir), draft_dtype="float64", context_lookup=False, **OPTIONS)
    make_static(llm, max_len=128)
    return llm


@pytest.mark.parametrize(
    "kind, sampling",
    [
        *(pytest.param("eager", sampling, id=f"eager-{name}") for name, sampling in SAMPLING.items()),
        pytest.param("static", {"temperature": 0.0, "max_tokens": 12}, id="static"),
    ],
)
def test_told_trees_are_those_of_the_steps(kind: str, sampling: dict[str, Any], request: pytest.FixtureRequest) -> None:
    llm: LLM = request.getfixturevalue(kind)
    params = params_of(sampling)
    deltas, records = run(llm, params)
    recorded = [entry for record in records for entry in record.requests]
    assert len(recorded) == len(deltas) > 10
    for delta, entry in zip(deltas, recorded, strict=True):
        assert (delta.request_id, delta.token_ids) == (entry.request_id, entry.token_ids)
        told, tree = delta.tree, entry.tree
        if told is None:
            assert delta.offset == 0 and tree.num_nodes == 1, "it ended the prompt"
            continue
        assert (told.token_ids, told.parents) == (tree.token_ids, tree.parents)
        assert told.path_logprobs == [score / SCORE_UNIT for score in tree.scores]
        assert told.accepted_nodes == entry.accepted_nodes
        assert told.sources[0] is A and A not in told.sources[1:] and len(told.sources) == tree.num_nodes
        kept = [told.token_ids[node] for node in told.accepted_nodes[1:]]
        assert kept == delta.token_ids[: delta.num_accepted] and len(kept) == delta.num_accepted
    sizes = [len(delta.tree.parents) for delta in deltas if delta.tree is not None]
    assert (max(sizes) > 1) == (params.speculation.mode != "off")


@pytest.mark.parametrize("sampling", [SAMPLING["greedy"], SAMPLING["sampled"]], ids=["greedy", "sampled"])
def test_replayed_steps_tell_the_same(tiny_target_dir: Path, tiny_head_dir: Path, sampling: dict[str, Any]) -> None:
    told = []
    for is_static in (False, True):
        llm = LLM(str(tiny_target_dir), str(tiny_head_dir), draft_dtype="float64", **OPTIONS)
        llm.engine.drafter.is_full_width = True
        runner = make_static(llm, max_len=128) if is_static else None
        deltas, _ = run(llm, params_of(sampling | {"max_tokens": 12}))
        told.append([(delta.request_id, delta.token_ids, delta.tree) for delta in deltas])
        assert runner is None or runner.num_static_steps > 5
    for ours, theirs in zip(*told, strict=True):
        assert ours == theirs
    sources = {source for _, _, tree in told[1] if tree is not None for source in tree.sources}
    assert sources >= ({A, H, C} if sampling["temperature"] == 0.0 else {A, H})


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_asking_changes_no_token(eager: LLM, sampling: dict[str, Any]) -> None:
    params = params_of(sampling)
    told, _ = run(eager, params)
    options = replace(params.speculation, include_trees=False)
    untold, _ = run(eager, replace(params, speculation=options))
    assert all(delta.tree is None for delta in untold)
    assert [(d.offset, d.token_ids) for d in told] == [(d.offset, d.token_ids) for d in untold]


def test_trees_come_with_every_step_whether_somebody_wants_them_or_not(static: LLM) -> None:
    params = params_of({"temperature": 0.0})
    sizes: list[int] = []
    compute = static.engine.compute

    def watch(*args: Any) -> Any:
        outcome = compute(*args)
        sizes.extend(len(tree.parents) for tree in outcome.trees)
        return outcome

    static.engine.compute = watch
    try:
        for wanted in (False, True):
            sizes.clear()
            one = replace(params, speculation=replace(params.speculation, include_trees=wanted))
            static.generate([[7]], one, on_delta=lambda delta: None)
            assert max(sizes) > 1
    finally:
        static.engine.compute = compute


def test_sources_of_an_engine(eager: LLM, tiny_target_dir: Path) -> None:
    def sources(llm: LLM, **options: Any) -> set[GuessSource]:
        params = params_of({"temperature": 0.0, "logit_bias": {17: 100.0}} | options)
        return {source for delta in run(llm, params)[0] if delta.tree for source in delta.tree.sources}

    assert {A, H, C} <= sources(eager)
    assert sources(eager, temperature=1.0, seed=1) == {A, H}
    lone = LLM(str(tiny_target_dir), drafter_factory=lambda *_: NoDrafter(), **OPTIONS)
    assert sources(lone) == {A, C}


@pytest.mark.parametrize(
    "token_ids, parents, guess, expected",
    [
        pytest.param([1, 2, 3, 4], [-1, 0, 0, 1], None, [A, H, H, H], id="no-guess"),
        pytest.param([1, 2, 3, 4], [-1, 0, 1, 2], ([2, 3, 4], 0), [A, C, C, C], id="context-alone"),
        pytest.param([1, 2, 3, 4], [-1, 0, 1, 2], ([2, 3, 4], 2), [A, B, B, C], id="shared-above"),
        pytest.param([1, 9, 2, 3, 3], [-1, 0, 0, 1, 2], ([2, 3], 2), [A, H, B, H, B], id="same-token-elsewhere"),
        pytest.param([1, 2, 8], [-1, 0, 1], ([2], 0), [A, C, H], id="head-below-context"),
        pytest.param([1], [-1], ([2, 3], 1), [A], id="root"),
    ],
)
def test_sources(
    token_ids: list[int], parents: list[int], guess: tuple[list[int], int] | None, expected: list[GuessSource]
) -> None:
    depths = [0] * len(parents)
    for i, parent in enumerate(parents[1:], 1):
        depths[i] = depths[parent] + 1
    tree = DraftTree(token_ids=token_ids, parents=parents, depths=depths, scores=[0] * len(parents))
    told = guess and ContextGuess(token_ids=guess[0], num_shared=guess[1])
    request: Any = SimpleNamespace(context_guess=told)
    assert told_tree(request, tree, [0]).sources == expected
    assert request.context_guess is None, "a guess is that of one step"


def test_whole_outputs_tell_no_trees(eager: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"speculation\.include_trees = True: only a stream"):
        eager.generate([[7]], params_of({"temperature": 0.0}))
    with pytest.raises(InvalidRequestError, match="include_trees = 1"):
        SpeculationOptions(include_trees=1)  # type: ignore[arg-type]


def test_a_stream_tells_them(eager: LLM) -> None:
    deltas = list(eager.stream([7, 8], params_of({"temperature": 0.0})))
    assert [delta.tree is None for delta in deltas] == [index == 0 for index in range(len(deltas))]
