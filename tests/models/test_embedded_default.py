"""What ships with the package: whole, small, loadable by others, and splittable over four ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jetflow_cluster.models.hub import DEFAULT_CHECKPOINT
from jetflow_cluster.models.loader import load_draft_head, load_sidecar, load_target
from jetflow_cluster.parallel.tp_group import TpGroup

CPU = torch.device("cpu")
MAX_BYTES = 64 * 2**20


def _json(name: str) -> dict[str, object]:
    return dict(json.loads((DEFAULT_CHECKPOINT / name).read_text()))


def test_it_is_at_most_64_mib_and_holds_no_pickle() -> None:
    files = [path for path in DEFAULT_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".jinja"}


def test_transformers_loads_the_target() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT / "target")
    body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n)
    assert body >= 13_000_000
    assert model.config.head_dim == 64


def test_the_head_has_the_published_format_and_is_causal() -> None:
    special = _json("draft_head/config.json")["dflash_config"]
    assert isinstance(special, dict)
    assert special["causal_head"] is special["causal"] is True


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_of_four_reads_its_part(rank: int) -> None:
    tp = TpGroup(rank, 4)
    target = load_target(DEFAULT_CHECKPOINT / "target", dtype=None, device=CPU, tp=tp)
    head = load_draft_head(DEFAULT_CHECKPOINT / "draft_head", target, device=CPU, tp=tp)
    assert (target.num_local_kv_heads, head.num_local_kv_heads) == (1, 1)
    assert load_sidecar(DEFAULT_CHECKPOINT / "draft_head", target, device=CPU) is not None


def test_held_out_prompts() -> None:
    prompts = json.loads((DEFAULT_CHECKPOINT / "held_out_prompts.json").read_text())
    assert len(prompts) == 200
    assert {len(entry["token_ids"]) for entry in prompts} == {128}
    assert len({tuple(entry["token_ids"]) for entry in prompts}) == 200


def test_model_card_names_licence_and_hardware() -> None:
    card = (DEFAULT_CHECKPOINT / "README.md").read_text()
    assert "psf-2.0" in card
    assert "cores" in card or "GPU" in card


def test_checkpoint_folder_is_part_of_the_package() -> None:
    import jetflow_cluster

    assert DEFAULT_CHECKPOINT.is_relative_to(Path(jetflow_cluster.__file__).parent)
