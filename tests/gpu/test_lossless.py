"""On a GPU, too, speculation changes no token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.bench.near_ties import NEAR_TIE, first_difference, greedy_gap
from jetflow_cluster.bench.prompts import load_prompts
from support.mixed_batches import make_requests, run_mixed
from support.near_ties import assert_same_tokens
from support.oracle import Oracle

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 16, "num_pages": 256},
        {"page_size": 48, "num_pages": 64, "max_num_batched_tokens": 64},
        {"page_size": 16, "num_pages": 30},
        {"page_size": 256, "num_pages": 24, "enable_prefix_cache": False},
    ],
    ids=["ample", "small-steps", "preempts", "large-pages"],
)
def test_fp32(options: dict[str, Any], folders: tuple[Path, Path], oracle: Oracle) -> None:
    prompts, params = make_requests(16, max_tokens=24)
    outputs = run_mixed(*folders, prompts, params, dtype="float32", device="cuda", **options)
    assert any(output.speculation.num_accepted_tokens for output in outputs)
    expected = [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    print("near-ties:", assert_same_tokens([o.token_ids for o in outputs], expected, prompts, params, oracle) or "none")


def test_fp64_without_exception(folders: tuple[Path, Path], oracle: Oracle) -> None:
    prompts, params = make_requests(9, max_tokens=20)
    outputs = run_mixed(*folders, prompts, params, dtype="float64", device="cuda", num_pages=256)
    assert [o.token_ids for o in outputs] == [oracle.complete(p, s)[0] for p, s in zip(prompts, params, strict=True)]


def _embedded(device: str, dtype: str, mode: str, num_prompts: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and output of the embedded default, greedy."""
    llm = LLM(dtype=dtype, draft_dtype=dtype, device=device, num_pages=1024, tree_nodes={64: 16})
    found = load_prompts(None, llm.tokenizer, max_prompts=num_prompts, max_prompt_tokens=256)
    prompts = [prompt.token_ids for prompt in found]
    options = SpeculationOptions(mode=mode)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, speculation=options)
    outputs = llm.generate(prompts, params)
    assert llm.stats().num_late_compilations == 0
    return [(prompt, output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)]


def test_the_embedded_default_says_on_a_gpu_what_it_says_on_a_cpu() -> None:
    found, expected = (_embedded(device, "float32", "force", 16) for device in ("cuda", "cpu"))
    near_ties = []
    for (prompt, ours), (_, theirs) in zip(found, expected, strict=True):
        at = first_difference(ours, theirs)
        if at is not None:
            gap = greedy_gap(None, prompt + theirs[:at], device="cpu")
            assert gap < NEAR_TIE, f"parts at token {at}, where the gap is {gap:.1e}"
            near_ties.append(f"token {at}, gap {gap:.1e}")
    print("near-ties:", near_ties or "none")
    assert len(near_ties) <= 1


def test_bf16_identity_rate() -> None:
    on, off = (_embedded("cuda", "bfloat16", mode, 32) for mode in ("force", "off"))
    same = [ours == theirs for (_, ours), (_, theirs) in zip(on, off, strict=True)]
    agreed = [first_difference(ours, theirs) for (_, ours), (_, theirs) in zip(on, off, strict=True)]
    num_agreed = sum(len(on[i][1]) if at is None else at for i, at in enumerate(agreed))
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "num_outputs": len(same),
        "share_of_equal_outputs": sum(same) / len(same),
        "share_of_tokens_before_the_first_difference": num_agreed / sum(len(ids) for _, ids in on),
    }
    folder = ROOT / "out" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bf16_identity.json").write_text(json.dumps(result, indent=1))
    print(result)
    # Far below what rounding alone does: 66 % of longer outputs are equal on a CPU.
    assert result["share_of_equal_outputs"] >= 0.3
