"""Target and draft head over threads that act as ranks: context, blocks and logits equal those of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jetflow_cluster import models
from jetflow_cluster.models.loader import load_draft_head, load_target
from jetflow_cluster.parallel.tp_group import TpGroup
from layers.ranks import on_ranks
from support.paged import TABLE, empty_kv, make_batch
from support.small_models import MASK_ID, write_head, write_target

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_target(tmp_path_factory.mktemp("sharded"), num_layers=4)
    (path / "head").mkdir()
    return write_head(path / "head", path, sidecar=False).parent


def _round(folder: Path, tp: TpGroup) -> dict[str, torch.Tensor]:
    """Prompt chunks, context of the head in bulk and by the token, one block, one tree."""
    with torch.inference_mode():
        target = load_target(folder, dtype=torch.float64, device=CPU, tp=tp)
        head = load_draft_head(folder / "head", target, device=CPU, tp=tp)
        kv = empty_kv(4, target.num_local_kv_heads, 16, torch.float64)
        draft_kv = empty_kv(2, head.num_local_kv_heads, 16, torch.float64)
        prompt = [5, 9, 2, 11, 40, 6]
        fused = []
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            _, taps = target(make_batch([prompt[start:stop]], [start], [None]), kv, head.config.target_layer_ids)
            fused.append(head.fuse(taps))
        slots = torch.tensor([int(TABLE[0, i // 4]) * 4 + i % 4 for i in range(6)])
        for start, part in ((0, torch.cat(fused[:2])), (5, fused[2])):
            rows = torch.arange(start, start + part.shape[0])
            head.project_context(part, rows, slots[rows], draft_kv)
        block = make_batch([[7] + [MASK_ID] * 3], [6], [None])
        guesses = target.compute_logits(head(target.embed(block.token_ids), block, draft_kv))
        hidden, _ = target(make_batch([[7, 20, 21, 22]], [6], [[-1, 0, 0, 1]]), kv)
        return {"guesses": guesses, "logits": target.compute_logits(hidden), "fused": torch.cat(fused)}


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_the_result_of_one(folder: Path, size: int) -> None:
    expected = _round(folder, TpGroup.single())
    for rank, found in enumerate(on_ranks(size, lambda tp: _round(folder, tp))):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-10, rtol=0, msg=f"{name} of rank {rank}")


def test_taps_come_in_the_order_asked_for(folder: Path) -> None:
    with torch.inference_mode():
        target = load_target(folder, dtype=torch.float64, device=CPU, tp=TpGroup.single())
        taps = {}
        for ids in ((0, 3), (3, 0), (2,)):
            kv = empty_kv(4, target.num_local_kv_heads, 16, torch.float64)
            taps[ids] = target(make_batch([[5, 9, 2]], [0], [None]), kv, ids)[1]
    assert torch.equal(taps[0, 3], taps[3, 0].roll(32, -1))
    assert taps[2,].shape == (3, 32)


def test_model_files_neither_communicate_nor_branch_on_ranks() -> None:
    text = "".join(path.read_text() for path in Path(models.__file__).parent.glob("*.py"))
    assert "class Qwen3Model" in text
    for word in ("torch.distributed", "dist.", "tp.size", "tp.rank"):
        assert word not in text
