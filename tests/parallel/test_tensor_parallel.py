"""TP 1, 2 and 4 over Gloo: the same logits, taps and guesses; sizes that cannot divide are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jetflow_cluster.models.loader import load_draft_head, load_target
from jetflow_cluster.parallel.shard import even_slice, kv_head_slice
from jetflow_cluster.parallel.tp_group import TpGroup
from support.paged import empty_kv, make_batch
from support.rank_engines import leave
from support.small_models import MASK_ID, write_head, write_target

CPU = torch.device("cpu")


@torch.inference_mode()
def _outputs(folder: Path, tp: TpGroup) -> dict[str, torch.Tensor]:
    target = load_target(folder, dtype=torch.float64, device=CPU, tp=tp)
    head = load_draft_head(folder / "head", target, device=CPU, tp=tp)
    kv = empty_kv(4, target.num_local_kv_heads, 16, torch.float64)
    prompt, tree, parents = [5, 9, 2, 11, 40], [20, 21, 22, 23], [-1, 0, 0, 1]
    target(make_batch([prompt], [0], [None]), kv)
    hidden, taps = target(make_batch([tree], [5], [parents]), kv, (1, 2))
    assert taps is not None
    draft_kv = empty_kv(2, head.num_local_kv_heads, 16, torch.float64)
    batch = make_batch([[7, MASK_ID, MASK_ID]], [0], [None])
    guesses = head(target.embed(batch.token_ids), batch, draft_kv)
    return {
        "logits": target.compute_logits(hidden),
        "taps": taps,
        "fused": head.fuse(taps),
        "guesses": target.compute_logits(guesses),
    }


def _run_rank(rank: int, size: int, folder: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    outputs = _outputs(Path(folder), TpGroup.from_process_group())
    torch.save(outputs, Path(store).parent / f"rank{rank}.pt")
    leave()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one(tmp_path: Path, size: int) -> None:
    write_target(tmp_path, num_layers=4)
    (tmp_path / "head").mkdir()
    write_head(tmp_path / "head", tmp_path, sidecar=False)
    expected = _outputs(tmp_path, TpGroup.single())
    # Two KV heads: at size 4 each is held by two ranks.
    mp.spawn(_run_rank, args=(size, str(tmp_path), str(tmp_path / "store")), nprocs=size)
    for rank in range(size):
        outputs = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, tensor in expected.items():
            torch.testing.assert_close(outputs[name], tensor, atol=1e-9, rtol=0, msg=f"{name} of rank {rank}")


@pytest.mark.parametrize(
    ("size", "message"),
    [(3, r"vocab_size = 288|not divisible by tensor_parallel_size = 3"), (8, "num_attention_heads = 4: not divisible")],
)
def test_sizes_that_cannot_divide(tmp_path: Path, size: int, message: str) -> None:
    write_target(tmp_path, num_layers=2)
    with pytest.raises(ValueError, match=message):
        load_target(tmp_path, dtype=torch.float32, device=CPU, tp=TpGroup(0, size))


@pytest.mark.parametrize(
    ("heads", "size", "expected"),
    [(4, 2, [(0, 2), (2, 4)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]), (1, 2, [(0, 1), (0, 1)])],
    ids=str,
)
def test_kv_heads_of_each_rank(heads: int, size: int, expected: list[tuple[int, int]]) -> None:
    parts = [kv_head_slice(heads, TpGroup(rank, size)) for rank in range(size)]
    assert [(p.start, p.stop) for p in parts] == expected


@pytest.mark.parametrize("heads_and_size", [(3, 2), (2, 3), (4, 6)], ids=str)
def test_kv_heads_that_cannot_divide(heads_and_size: tuple[int, int]) -> None:
    heads, size = heads_and_size
    with pytest.raises(
        ValueError, match=f"num_key_value_heads = {heads}: not divisible by tensor_parallel_size = {size}"
    ):
        kv_head_slice(heads, TpGroup(0, size))


def test_even_slices_cover_all() -> None:
    assert [even_slice(12, TpGroup(r, 3), "x") for r in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match="rank = 2"):
        TpGroup(2, 2)
