"""A draft head that is worth nothing: what speculation costs where no guess is right."""

from __future__ import annotations

from pathlib import Path

import torch

from jetflow_cluster.models.draft_head import DraftHead, DraftHeadConfig
from jetflow_cluster.models.loader import save_draft_head
from jetflow_cluster.parallel.tp_group import TpGroup


def write_random_head(like: Path, folder: Path, *, seed: int = 0) -> None:
    """Writes a head of the shape of another one, with random weights and without a side-car.

    Args:
        like: folder of a head.
        folder: where the new one goes.
        seed: of the weights.
    """
    config = DraftHeadConfig.from_dir(like)
    with torch.device("meta"):
        head = DraftHead(config, TpGroup.single(), torch.device("meta"))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape, *_ in head.pieces():
        if "norm" in name:
            state[name] = torch.ones(shape)
        else:
            state[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    save_draft_head(folder, config, state)
