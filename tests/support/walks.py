"""Random trees, logits and options, and their walks on the CPU, for kernels that accept."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from jetflow_cluster.layers.sampler import SamplingRow, TokenCounts, choose_tokens
from jetflow_cluster.layers.walk_table import WalkSampling
from jetflow_cluster.tree.accept import AcceptedPath, accept_trees
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SamplingParams
from jetflow_kernels.accept_tree import SamplingTable, VerifiedTrees, WalkBuffers


@dataclass(frozen=True, kw_only=True)
class WalkCase:
    """One batch."""

    trees: list[DraftTree]
    samplings: list[WalkSampling]
    first_rows: list[int]
    logits: torch.Tensor

    def row(self, request: int, path: list[int]) -> SamplingRow:
        """What the CPU's sampler must know of a node."""
        s = self.samplings[request]
        return SamplingRow(
            params=s.params,
            seed=s.seed,
            position=s.position + len(path),
            counts=s.counts,
            path=path,
            suppressed_ids=s.barred_ids if len(path) < s.num_barred else (),
        )

    def expected(self) -> list[AcceptedPath]:
        """The CPU's walks."""

        def choose(walking: list[tuple[int, int, list[int]]]) -> list[int]:
            rows = [self.first_rows[r] + node for r, node, _ in walking]
            return choose_tokens(self.logits[rows], [self.row(r, path) for r, _, path in walking])

        return accept_trees(self.trees, choose)

    def verified(self, device: str) -> VerifiedTrees:
        """As the kernels read it."""
        width = max(tree.num_nodes for tree in self.trees)

        def padded(lists: list[list[int]]) -> torch.Tensor:
            return torch.tensor([x + [-9] * (width - len(x)) for x in lists], dtype=torch.int32, device=device)

        return VerifiedTrees(
            token_ids=padded([tree.token_ids for tree in self.trees]),
            parents=padded([tree.parents for tree in self.trees]),
            counts=torch.tensor([tree.num_nodes for tree in self.trees], dtype=torch.int32, device=device),
            first_rows=torch.tensor(self.first_rows, dtype=torch.int32, device=device),
            logits=self.logits.to(device),
        )

    def buffers(self, table: SamplingTable | None, device: str) -> WalkBuffers:
        """Poisoned."""
        made = WalkBuffers.allocate(
            num_requests=len(self.trees),
            num_levels=1 + max(max(tree.depths) for tree in self.trees),
            num_rows=self.logits.shape[0],
            vocab_size=self.logits.shape[1],
            is_processed=table is not None and table.is_processed,
            device=torch.device(device),
        )
        for tensor in vars(made).values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
        return made


def paths_of(out: WalkBuffers) -> list[AcceptedPath]:
    """What a walk left, on the host."""
    return [
        AcceptedPath(nodes=nodes[:length], token_ids=tokens[:length])
        for nodes, tokens, length in zip(out.nodes.tolist(), out.token_ids.tolist(), out.lengths.tolist(), strict=True)
    ]


def make_walks(
    rng: random.Random,
    params: list[SamplingParams],
    *,
    vocab_size: int,
    num_nodes: int,
    dtype: torch.dtype = torch.float32,
    step: float = 0.0,
    helpful: float = 0.7,
) -> WalkCase:
    """Trees of which some nodes carry what the target says; `step` rounds logits, so that many are equal."""
    sizes = [rng.choice((1, 2, num_nodes, num_nodes)) for _ in params]
    first_rows: list[int] = []
    num_rows = rng.randint(0, 2)
    for size in sizes:
        first_rows.append(num_rows)
        num_rows += size + rng.choice((0, 0, 1))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * rng.choice((1.0, 3.0))
    if step:
        logits = (logits / step).round() * step
    samplings = []
    for p in params:
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 9))]
        output = [rng.randrange(vocab_size // 2) for _ in range(rng.randint(0, 9))]
        samplings.append(
            WalkSampling(
                params=p,
                seed=rng.randrange(2**64),
                position=rng.randrange(5000),
                counts=TokenCounts(prompt, output),
                num_barred=rng.choice((0, 0, 1, 3)),
                barred_ids=tuple(rng.sample(range(vocab_size + 3), rng.choice((0, 3)))),
            )
        )
    case = WalkCase(trees=[], samplings=samplings, first_rows=first_rows, logits=logits.to(dtype))
    for r, size in enumerate(sizes):
        tokens, parents, depths, paths = [rng.randrange(vocab_size)], [-1], [0], [[]]
        for _ in range(1, size):
            parent = len(parents) - 1 if rng.random() < 0.5 else rng.randrange(len(parents))
            row = first_rows[r] + parent
            right = choose_tokens(case.logits[row : row + 1], [case.row(r, paths[parent])])[0]
            tokens.append(right if rng.random() < helpful else rng.randrange(vocab_size))
            parents.append(parent)
            depths.append(depths[parent] + 1)
            paths.append([*paths[parent], tokens[-1]])
        case.trees.append(DraftTree(token_ids=tokens, parents=parents, depths=depths, scores=[0] * size))
    return case
