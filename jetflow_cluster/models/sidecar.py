"""The side-car: a low-rank correction of draft logits by the token before, in files beside any published head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

CONFIG_NAME = "sidecar_config.json"
WEIGHTS_NAME = "sidecar.safetensors"


@dataclass(frozen=True, kw_only=True)
class SideCarConfig:
    """What a side-car was trained with."""

    #: Columns of the two factors.
    rank: int
    #: Candidates per depth among which it was trained.
    width: int
    #: `fingerprint` of the target's embedding.
    target_fingerprint: str
    #: `fingerprint` of the head's weights.
    head_fingerprint: str
    #: Exponent of the head's probabilities at depths 2 and deeper, for greedy requests.
    sharpness: float = 1.0


class SideCar(nn.Module):
    """``<parent[p], child[c]>`` is added to the logit of token c behind token p; a `Correction` of tables."""

    def __init__(self, config: SideCarConfig, parent: torch.Tensor, child: torch.Tensor):
        super().__init__()
        if parent.shape != child.shape or parent.shape[1] != config.rank:
            raise ValueError(
                f"side-car: parent.weight {list(parent.shape)} and child.weight {list(child.shape)}: "
                f"both must be [vocab_size, rank = {config.rank}]"
            )
        self.config = config
        self.parent = nn.Parameter(parent, requires_grad=False)
        self.child = nn.Parameter(child, requires_grad=False)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, shapes and values rounded to bf16, so that it survives a change of dtype."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def save_sidecar(folder: Path, sidecar: SideCar) -> None:
    """Writes the two files."""
    from safetensors.torch import save_file

    tensors = {"parent.weight": sidecar.parent.data.contiguous(), "child.weight": sidecar.child.data.contiguous()}
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(sidecar.config), indent=1))
