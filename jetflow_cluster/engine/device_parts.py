"""Which implementation builds trees and walks them on a device."""

from __future__ import annotations

from functools import partial

import torch

from jetflow_cluster.engine.choice import accept_on_host
from jetflow_cluster.engine.device_acceptance import accept_on_device
from jetflow_cluster.engine.device_builder import build_trees_on_device
from jetflow_cluster.engine.protocols import Acceptor, TreeBuilder
from jetflow_cluster.engine.trees import build_planned_trees
from jetflow_kernels.shipped import runs_triton


def tree_builder_for(device: torch.device) -> TreeBuilder:
    """The exact trees, by the kernels where they run."""
    if runs_triton(device):
        return partial(build_planned_trees, build=partial(build_trees_on_device, device=device))
    return build_planned_trees


def acceptor_for(device: torch.device) -> Acceptor:
    """The accepting walk, by the kernels where they run."""
    return accept_on_device if runs_triton(device) else accept_on_host
