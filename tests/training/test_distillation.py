"""The whole way from a text to a head with a side-car, small: what comes out loads and is served."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.training.calibration import calibration_rollouts, fit_lookup_weights, fit_sharpness
from jetflow_cluster.training.distill import DistillConfig, distill
from jetflow_cluster.training.evaluate import EvaluateConfig, evaluate, read_sidecar
from jetflow_cluster.training.regenerate import CORPUS_SHARES, check_same_tokenizer, load_tokenizer, read_streams
from jetflow_cluster.training.sidecar_training import SideCarTrainingConfig, train_sidecar
from jetflow_cluster.tree.lookup import LOOKUP_WEIGHTS
from support.small_models import write_target


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    target = tmp_path / "target"
    target.mkdir()
    write_target(target, num_layers=4, dtype=torch.float32)
    words = ["alpha", "beta", "gamma", "delta", "(", ")", "\n", "    return "]
    rng = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(rng.choice(words) for _ in range(3000)))
    return DistillConfig(
        target=target,
        source=text,
        output_dir=tmp_path / "out",
        num_regenerated=48,
        num_windows=8,
        prompt_tokens=32,
        new_tokens=24,
        num_sequences=4,
        num_anchors=8,
        num_held_out=4,
        held_out_tokens=16,
        max_blocks=160,
        max_minutes=5.0,
        measure_every_minutes=100.0,
    )


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 6])
def test_taps_are_layers_that_the_target_has(tmp_path: Path, num_layers: int) -> None:
    write_target(tmp_path, num_layers=num_layers)
    config = DistillConfig(target=tmp_path, source=tmp_path, output_dir=tmp_path)
    taps = list(config.taps())
    assert taps and taps == sorted(set(taps)) and taps[0] >= 0 and taps[-1] < num_layers
    assert replace(config, target_layer_ids=(0,)).taps() == (0,)
    for wrong in ((-1, 0), (num_layers,), (0, 0), ()):
        with pytest.raises(ValueError, match="target_layer_ids = "):
            replace(config, target_layer_ids=wrong).taps()


def test_a_head_is_trained_measured_and_served(config: DistillConfig, tmp_path: Path) -> None:
    head = distill(config)
    assert distill(config) == head
    sidecar = SideCarTrainingConfig(
        distill=config, head=head, max_blocks=200, max_gather_minutes=0.02, max_minutes=0.02, batch_size=64
    )
    assert train_sidecar(sidecar) == head
    rollouts = calibration_rollouts(config)
    assert fit_sharpness(head, rollouts) == read_sidecar(head).config.sharpness
    weights = fit_lookup_weights(head, rollouts)
    assert [len(row) for row in weights] == [len(row) for row in LOOKUP_WEIGHTS]
    assert all(0 < weight < 1 for row in weights for weight in row)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["' + "alpha beta gamma delta " * 3 + '", "' + "return delta ( ) " * 4 + '"]')
    found = evaluate(
        EvaluateConfig(
            target=config.target,
            head=head,
            prompts=prompts,
            output_dir=tmp_path / "evaluation",
            prompt_tokens=32,
            num_tokens=16,
            budgets=(8, 16),
        )
    )
    assert {"exact tree, side-car", "coupled tree, side-car", "prompt lookup"} <= {r["name"] for r in found["rows"]}
    assert all(a >= 1 for r in found["rows"] for a in r["acceptance"])

    llm = LLM(str(config.target), str(head), dtype="float32", num_pages=32)
    assert llm.engine.drafter.sidecar is not None
    params = [
        SamplingParams(max_tokens=12, temperature=t, seed=1, speculation=SpeculationOptions(mode=mode))
        for t in (0.0, 1.0)
        for mode in ("off", "force")
    ]
    outputs = [o.token_ids for o in llm.generate([[5, 6, 7]] * 4, params)]
    assert outputs[0] == outputs[1]
    assert outputs[2] == outputs[3]


def test_an_interrupted_run_goes_on_where_it_stopped(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetflow_cluster.training import distill as module

    calls = 0
    real = module.block_loss

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    # States are written beside measurements.
    config = replace(config, measure_every_minutes=0.0)
    monkeypatch.setattr(module, "block_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(config, state_every_s=0.0)
    state = torch.load(config.output_dir / "state.pt", weights_only=True)
    assert state["step"] == 1
    head = distill(config, state_every_s=0.0)
    once = distill(replace(config, output_dir=config.output_dir.parent / "once", data_dir=config.sequences_dir))
    resumed, whole = ((h / "model.safetensors").read_bytes() for h in (head, once))
    assert resumed == whole


def test_a_run_goes_on_from_a_head_of_the_same_shape_only(config: DistillConfig, tmp_path: Path) -> None:
    head = distill(config)
    # A rate of zero leaves what was loaded as it is.
    again = replace(config, output_dir=tmp_path / "again", data_dir=config.sequences_dir, init_head=head)
    unchanged = distill(replace(again, learning_rates=(0.0, 0.0)))
    assert (unchanged / "model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"draft_head: its block_size = 8, this run's is 4"):
        distill(replace(again, block_size=4, output_dir=tmp_path / "other"))


def test_a_corpus_of_another_tokenizer_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    tokenizer = load_tokenizer(config.target)
    tokenizer.save(str(corpus / "tokenizer.json"))
    for part in CORPUS_SHARES:
        np.arange(8, dtype=np.uint16).tofile(corpus / f"train.{part}.bin")
    streams = read_streams(corpus, config.target)
    assert streams is not None
    assert len(streams) == len(CORPUS_SHARES)
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(corpus / "tokenizer.json"))
    for refused in (read_streams, check_same_tokenizer):
        with pytest.raises(ValueError, match="another tokenizer"):
            refused(corpus, config.target)
