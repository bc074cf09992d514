"""A draft head that is worth nothing: what speculation costs where no guess is right."""

from __future__ import annotations

from pathlib import Path

import torch

from jetflow_cluster.models.draft_head import DraftHeadConfig
from jetflow_cluster.training.head_model import TrainableHead, save_head


def write_random_head(like: Path, folder: Path, *, seed: int = 0) -> None:
    """Writes a head of the shape of another one, untrained and without a side-car.

    Args:
        like: folder of a head.
        folder: where the new one goes.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_head(folder, TrainableHead(DraftHeadConfig.from_dir(like)))
