"""Compiled candidate tables beside those of torch; what both give in ordinary cases is in tests/tree."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from jetflow_cluster.tree import coupled
from jetflow_cluster.tree.build import MIN_SCORE, CandidateTable
from jetflow_cluster.tree.coupled import candidate_tables
from jetflow_kernels.cpu import cpu_kernels
from jetflow_kernels.cpu.candidates import draft_candidates

pytestmark = pytest.mark.skipif(cpu_kernels().functions is None, reason="no compiled CPU kernels")


def _tables(logits: torch.Tensor, width: int, sidecar: SimpleNamespace | None) -> list[CandidateTable]:
    num = logits.shape[0]
    return candidate_tables(
        logits, width=width, anchor_ids=[0] * num, sampling=[None] * num, sidecar=sidecar, sharpness=1.4
    )


def _by_torch(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, width: int, sidecar: SimpleNamespace | None
) -> Sequence[CandidateTable]:
    with monkeypatch.context() as patched:
        patched.setattr(coupled, "draft_candidates", lambda logits, **options: None)
        return _tables(logits, width, sidecar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1, 33, 64])
@pytest.mark.parametrize("vocab, width", [(1, 1), (40, 40), (64, 16), (4097, 16), (300_001, 7)])
def test_tables_are_those_of_torch(
    vocab: int, width: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(vocab + rank)
    # Distinct within a row, in bf16 too as far as it goes: equal logits leave the order open.
    values = torch.linspace(-30, 4, vocab).repeat(2, 3, 1)
    values[..., : min(vocab, 64)] = torch.linspace(5, 12, min(vocab, 64))
    logits = values.gather(2, torch.rand(2, 3, vocab, generator=generator).argsort(-1)).to(dtype)
    sidecar = None
    if rank:
        parent, child = torch.randn(2, vocab, rank, generator=generator) * rank**-0.5
        sidecar = SimpleNamespace(parent=parent, child=child)
    for one, other in zip(_tables(logits, width, sidecar), _by_torch(monkeypatch, logits, width, sidecar), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scores.shape == other.scores.shape
        # 16 units are 2.4e-4 nats; scores far below are less precise in fp32.
        torch.testing.assert_close(one.scores.double(), other.scores.double(), atol=16, rtol=1e-5)


def test_equal_logits_go_to_the_lower_ids() -> None:
    logits = torch.zeros(1, 1, 500)
    logits[0, 0, [400, 70, 300]] = 1.0
    assert _tables(logits, 6, None)[0].ids.tolist() == [[70, 300, 400, 0, 1, 2]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_gives_a_table(broken: float) -> None:
    """Distinct candidates and scores within bounds, whatever a head says."""
    logits = torch.randn(3, 2, 200)
    logits[0] = broken
    logits[1, 1, 5:] = broken
    logits[2, 0, 150] = broken
    sidecar = SimpleNamespace(parent=torch.full((200, 4), 3.0), child=torch.randn(200, 4))
    for table in _tables(logits, 8, sidecar):
        assert all(len(set(ids)) == 8 and 0 <= min(ids) <= max(ids) < 200 for ids in table.ids.tolist())
        assert int(table.scores.min()) >= MIN_SCORE and int(table.scores.max()) <= 0


def test_a_request_does_not_depend_on_the_others() -> None:
    logits = torch.randn(40, 7, 4096)
    sidecar = SimpleNamespace(parent=torch.randn(4096, 64), child=torch.randn(4096, 64) / 8)
    for dtype in (torch.float32, torch.bfloat16):
        together = _tables(logits.to(dtype), 16, sidecar)
        for r in (0, 17, 39):
            alone = _tables(logits[r : r + 1].to(dtype), 16, sidecar)[0]
            assert torch.equal(alone.ids, together[r].ids) and torch.equal(alone.scores, together[r].scores)


def test_parts_of_wider_logits_and_what_is_not_served() -> None:
    whole = torch.randn(3, 5, 90)
    assert torch.equal(_tables(whole[:, :2], 4, None)[1].scores, _tables(whole[:, :2].contiguous(), 4, None)[1].scores)
    options = {"width": 4, "sharpness": 1.0, "factors": None}
    assert draft_candidates(whole[1:, :2], **options) is not None
    for unserved in (whole.double(), whole.half(), whole.transpose(1, 2), whole.clone().requires_grad_()):
        assert draft_candidates(unserved, **options) is None
    strided = torch.randn(3, 90).T
    assert draft_candidates(whole, **(options | {"factors": (strided, strided)})) is None
