"""Random candidate tables and limits, with many ties, for kernels that build trees."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from jetflow_kernels.build_tree import Candidates, RowLayout, TreeBuffers, TreeLimits


@dataclass(frozen=True, kw_only=True)
class TableCase:
    """One batch."""

    candidates: Candidates
    limits: TreeLimits
    #: Nodes of one tree, and rows of all, that buffers are made for.
    num_nodes: int
    num_rows: int

    def buffers(self, device: str = "cpu") -> TreeBuffers:
        """Filled with what must not be read."""
        num_requests, num_depths, width = self.candidates.ids.shape
        made = TreeBuffers.allocate(
            num_requests=num_requests,
            num_nodes=self.num_nodes,
            num_rows=self.num_rows,
            num_depths=num_depths,
            width=width,
            is_conditional=self.candidates.scores.shape[2] > 1,
            device=torch.device(device),
        )
        for value in vars(made).values():
            if isinstance(value, torch.Tensor):
                value.fill_(-77)
        return made

    def to(self, device: str) -> TableCase:
        """The same elsewhere."""
        limits = {name: None if x is None else x.to(device) for name, x in vars(self.limits).items()}
        return TableCase(
            candidates=Candidates(ids=self.candidates.ids.to(device), scores=self.candidates.scores.to(device)),
            limits=TreeLimits(**limits),
            num_nodes=self.num_nodes,
            num_rows=self.num_rows,
        )


def make_tables(
    rng: random.Random,
    *,
    num_requests: int,
    num_depths: int,
    width: int,
    is_conditional: bool,
    spread: int,
    num_nodes: int,
    budget: int,
    is_priced: bool = False,
) -> TableCase:
    """Scores in [-spread, 0], so that a small spread gives many ties; token ids repeat; some requests are absent, get a
    root only, few candidates, or a bias."""
    shape = (num_requests, num_depths, width if is_conditional else 1, width)
    scores = [-rng.randint(0, spread) for _ in range(torch.Size(shape).numel())]
    ids = [rng.randint(0, 9) for _ in range(num_requests * num_depths * width)]
    requests = [
        (
            rng.choice((0, 1, 2, num_nodes, num_nodes, num_nodes)),
            rng.choice((0, 1, num_depths, num_depths, num_depths + 3)),
            rng.choice((1, width, width)),
            rng.choice((0, 0, -2, 3, 70_000)),
        )
        for _ in range(num_requests)
    ]
    cost = value_table = None
    if is_priced:
        cost = torch.tensor([rng.choice((0, 0, 1, 3)) for _ in range(budget + 1)]).cumsum(0) + rng.choice((1, 5, 40))
        value_table = make_value_table()
    return TableCase(
        candidates=Candidates(
            ids=torch.tensor(ids).view(num_requests, num_depths, width),
            scores=torch.tensor(scores, dtype=torch.int32).view(shape),
        ),
        limits=TreeLimits(
            anchor_ids=torch.tensor([rng.randint(0, 99) for _ in range(num_requests)]),
            requests=torch.tensor(requests, dtype=torch.int32).view(num_requests, 4),
            budget=torch.tensor([budget], dtype=torch.int32),
            cost=cost,
            value_table=value_table,
        ),
        num_nodes=num_nodes,
        num_rows=budget,
    )


def make_value_table() -> torch.Tensor:
    """Expected tokens by score, int64, 24 nats long."""
    steps = torch.arange(24 * 256, dtype=torch.float64)
    return (2.0**24 * (-steps / 256).exp()).round().to(torch.int64)


def assert_same_trees(one: TreeBuffers, other: TreeBuffers) -> None:
    """Everything that is defined is equal."""
    counts = one.counts.tolist()
    assert counts == other.counts.tolist()
    assert one.row_start.tolist() == other.row_start.tolist()
    for r, count in enumerate(counts):
        for name in ("token_ids", "parents", "depths", "scores"):
            assert getattr(one, name)[r, :count].tolist() == getattr(other, name)[r, :count].tolist(), (r, name)


def make_layout(trees: TreeBuffers, tile_rows: int) -> RowLayout:
    """Filled with what must be overwritten."""
    layout = RowLayout.allocate(
        num_requests=trees.num_requests,
        num_nodes=trees.num_nodes,
        num_rows=trees.num_rows,
        tile_rows=tile_rows,
        device=trees.token_ids.device,
    )
    for value in vars(layout).values():
        value.fill_(77)
    return layout
