"""Reads checkpoints: safetensors only, each rank its own slice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from jetflow_cluster.layers.linear import Piece
from jetflow_cluster.models.config import TargetConfig, read_json
from jetflow_cluster.models.draft_head import DraftHead, DraftHeadConfig, head_config_json
from jetflow_cluster.models.registry import TARGETS, TargetModel
from jetflow_cluster.models.sidecar import CONFIG_NAME, WEIGHTS_NAME, SideCar, SideCarConfig, fingerprint
from jetflow_cluster.parallel.tp_group import TpGroup

_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
#: Tensors of older checkpoints that follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq",)


def resolve_checkpoint(path_or_id: str | Path) -> Path:
    """A checkpoint's folder; what is no folder is taken as a Hugging Face id and fetched.

    Raises:
        FileNotFoundError: there is no such folder, and no such model could be fetched.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder, and no Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:
        raise FileNotFoundError(f"{name}: no such folder, and fetching it failed: {error}") from error


def load_target(folder: Path, *, dtype: torch.dtype | None, device: torch.device, tp: TpGroup) -> TargetModel:
    """Loads this rank's part of a target.

    Args:
        folder: a checkpoint in Hugging Face format.
        dtype: of weights and activations; None is the checkpoint's.
        device: where to put them.
        tp: the ranks that share the model.

    Raises:
        ValueError: the architecture or a feature is not supported, a size cannot be divided, or tensors are missing,
            unexpected or misshapen; names them.
    """
    config = TargetConfig.from_dir(folder)
    if config.architecture not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise ValueError(f"{folder / 'config.json'}: architecture {config.architecture}: supported are {known}")
    with torch.device("meta"):
        model = TARGETS[config.architecture](config, tp, device)
    ignored = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return _filled(model, folder, dtype or getattr(torch, config.dtype), device, ignored)


def load_draft_head(
    folder: Path, target: TargetModel, *, dtype: torch.dtype | None = None, device: torch.device, tp: TpGroup
) -> DraftHead:
    """Loads this rank's part of a draft head that fits `target`. Raises ValueError as `load_target` does."""
    config = DraftHeadConfig.from_dir(folder)
    config.check_fits(target.config)
    with torch.device("meta"):
        head = DraftHead(config, tp, device)
    return _filled(head, folder, dtype or target.dtype, device, ())


def load_sidecar(folder: Path, target: TargetModel, *, device: torch.device) -> SideCar | None:
    """The side-car beside a head, or None when there is none.

    Raises:
        ValueError: it was trained for another target, or its tensors have the wrong shape.
    """
    if not (folder / CONFIG_NAME).exists():
        return None
    raw = read_json(folder / CONFIG_NAME)
    try:
        config = SideCarConfig(**(raw | {"scales": tuple(raw.get("scales", ()))}))
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from None
    expected = fingerprint({"embedding": target.embedding.weight})
    if target.embedding.weight.shape[0] == target.config.vocab_size and config.target_fingerprint != expected:
        raise ValueError(
            f"{folder / CONFIG_NAME}: target_fingerprint = {config.target_fingerprint}, the target's is {expected}"
        )
    with safe_open(folder / WEIGHTS_NAME, framework="pt", device=str(device)) as file:
        # Small, and ids are looked up on every rank: fp32 and whole.
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if set(tensors) != {"parent.weight", "child.weight"}:
        raise ValueError(f"{folder / WEIGHTS_NAME}: has {sorted(tensors)}, needs parent.weight and child.weight")
    if tensors["parent.weight"].shape[0] != target.config.vocab_size:
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: {tensors['parent.weight'].shape[0]} rows, the vocabulary has "
            f"{target.config.vocab_size}"
        )
    return SideCar(config, tensors["parent.weight"], tensors["child.weight"])


def save_draft_head(folder: Path, config: DraftHeadConfig, state: dict[str, torch.Tensor]) -> None:
    """Writes a head in the published format: ``model.safetensors`` and ``config.json``.

    Raises:
        ValueError: `state` has not exactly the published keys and shapes.
    """
    from safetensors.torch import save_file

    with torch.device("meta"):
        head = DraftHead(config, TpGroup.single(), torch.device("cpu"))
    _check_names(
        {name: shape for name, shape, *_ in head.pieces()}, {n: tuple(t.shape) for n, t in state.items()}, folder
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(head_config_json(config), indent=1))


def _filled(model: Any, folder: Path, dtype: torch.dtype, device: torch.device, ignored: tuple[str, ...]) -> Any:
    model.to(dtype).to_empty(device=device)
    pieces = list(model.pieces())
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
        for name in [n for n in found if n in ignored or n.endswith(_DERIVED)]:
            del found[name]
        _check_names({name: shape for name, shape, *_ in pieces}, found, folder)
        _copy(pieces, where)
    return model.eval()


def _copy(pieces: Iterable[Piece], where: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, _, slices, destination in pieces:
            destination.copy_(where[name].get_slice(name)[slices])


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name in sorted(set(read_json(index)["weight_map"].values())):
            if not (folder / name).exists():
                raise ValueError(f"{index}: names {name}, which is missing")
            yield folder / name
        return
    single = folder / "model.safetensors"
    if not single.exists():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {', '.join(others)} may hold code and is not read" if others else ""
        raise ValueError(f"{folder}: model.safetensors is missing{hint}")
    yield single


def _check_names(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], folder: Path) -> None:
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{folder}: {shown}")
