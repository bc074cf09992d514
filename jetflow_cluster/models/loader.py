"""Loads models from checkpoints: each rank its own slice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jetflow_cluster.layers.embedding import ParallelLmHead
from jetflow_cluster.layers.linear import Linear, Piece
from jetflow_cluster.models.config import TargetConfig, architecture_of
from jetflow_cluster.models.draft_head import DraftFuser, DraftHead, DraftHeadConfig, head_config_json
from jetflow_cluster.models.progress import LoadProgress
from jetflow_cluster.models.registry import TARGETS, TargetModel
from jetflow_cluster.models.sidecar import CONFIG_NAME, WEIGHTS_NAME, SideCar, SideCarConfig, fingerprint
from jetflow_cluster.models.stored_files import check_sizes, read_json, read_shapes, weight_files
from jetflow_cluster.models.target_ends import TargetEnds
from jetflow_cluster.models.weights import StoredTensors, check_names
from jetflow_cluster.parallel.tp_group import TpGroup

#: Tensors of older checkpoints that follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq",)


def load_target(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    tp: TpGroup,
    rounded_to: torch.dtype | None = None,
) -> TargetModel:
    """Loads this rank's part of a target.

    Args:
        folder: a checkpoint in Hugging Face format.
        dtype: of weights and activations; None is the checkpoint's.
        device: where to put them; on ``meta`` the checkpoint is checked and nothing is read.
        tp: the ranks that share the model.
        rounded_to: a narrower dtype whose values the weights are given; None leaves them as stored.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: the architecture or a feature is not supported, a size cannot be divided, or tensors are missing,
            unexpected or misshapen; names them.
    """
    named = architecture_of(read_json(folder / "config.json"))
    if named not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise ValueError(f"{folder / 'config.json'}: architecture {named}: supported are {known}")
    config = TargetConfig.from_dir(folder)
    check_sizes(config.num_layers, config.hidden_size, read_shapes(weight_files(folder)), folder, prefix="model.")
    with torch.device("meta"):
        model = TARGETS[named](config, tp, device)
    model.checkpoint_dir = folder
    ignored = ("lm_head.weight",) if config.tie_word_embeddings else ()
    _fill(model, folder, dtype, config.dtype, device, ignored, rounded_to=rounded_to)
    return model


def load_draft_head(
    folder: Path,
    target: TargetModel | TargetConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    tp: TpGroup,
) -> DraftHead:
    """Loads this rank's part of a draft head that fits `target`.

    Args:
        folder: a checkpoint in the published DFlash or JetSpec format.
        target: what the head was made for; its configuration will do where the model itself is elsewhere.
        dtype: None is the target's, or the checkpoint's where only a configuration is given.
        device: as in `load_target`.
        tp: as in `load_target`.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: as `load_target` does, and where head and target do not fit, with both values.
    """
    config = DraftHeadConfig.from_dir(folder)
    config.check_fits(target if isinstance(target, TargetConfig) else target.config)
    check_sizes(config.num_layers, config.hidden_size, read_shapes(weight_files(folder)), folder)
    with torch.device("meta"):
        head = DraftHead(config, tp, device)
    if dtype is None and not isinstance(target, TargetConfig):
        dtype = target.dtype
    _fill(head, folder, dtype, config.dtype, device, ())
    return head


def load_target_ends(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device, rounded_to: torch.dtype | None = None
) -> TargetEnds:
    """Loads a target's embedding and output layer alone; arguments and errors as `load_target`."""
    config = TargetConfig.from_dir(folder)
    with torch.device("meta"):
        ends = TargetEnds(config, TpGroup.single())
    ends.checkpoint_dir = folder
    _fill(ends, folder, dtype, config.dtype, device, (), partial=True, rounded_to=rounded_to)
    return ends


def load_fuser(
    folder: Path, target: TargetModel, *, dtype: torch.dtype | None = None, device: torch.device
) -> DraftFuser:
    """Loads the part of a draft head that reads the target's taps; arguments and errors as `load_draft_head`."""
    config = DraftHeadConfig.from_dir(folder)
    config.check_fits(target.config)
    with torch.device("meta"):
        fuser = DraftFuser(config)
    _fill(fuser, folder, dtype or target.dtype, config.dtype, device, (), partial=True)
    return fuser


def load_sidecar(folder: Path, target: TargetEnds, *, device: torch.device) -> SideCar | None:
    """The side-car beside a head, or None when there is none. Each rank holds all of it, in fp32.

    Raises:
        ValueError: it was trained for another target or another head, or its tensors have the wrong shape.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        config = SideCarConfig(**raw)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    with StoredTensors([folder / WEIGHTS_NAME]) as stored:
        shape = (target.config.vocab_size, config.rank)
        check_names({"parent.weight": shape, "child.weight": shape}, stored.shapes, folder / WEIGHTS_NAME)
        parent, child = (stored[f"{name}.weight"].to(device, torch.float32) for name in ("parent", "child"))
    found = {"target_fingerprint": _target_fingerprint(target), "head_fingerprint": head_fingerprint(folder)}
    for name, expected in found.items():
        if getattr(config, name) != expected:
            what = name.removesuffix("_fingerprint")
            raise ValueError(f"{path}: {name} = {getattr(config, name)}, the {what}'s is {expected}")
    return SideCar(config, parent, child)


def sidecar_rank(folder: Path) -> int:
    """Columns of the side-car beside a head; 0 when there is none."""
    path = folder / CONFIG_NAME
    return int(read_json(path)["rank"]) if path.exists() else 0


def _target_fingerprint(target: TargetEnds) -> str:
    """Of the stored embedding: a rank holds a part of it only, and perhaps in another dtype."""
    if target.checkpoint_dir is None:
        return fingerprint({"embedding": target.embedding.weight})
    name = next(name for name, *_ in target.embedding.pieces())
    with StoredTensors.of_checkpoint(target.checkpoint_dir) as stored:
        return fingerprint({"embedding": stored[name]})


def head_fingerprint(folder: Path) -> str:
    """Of a draft head's stored weights; see `fingerprint`."""
    with StoredTensors.of_checkpoint(folder) as stored:
        return fingerprint(stored)


def save_draft_head(folder: Path, config: DraftHeadConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Writes a head in the published format: ``model.safetensors`` and ``config.json``.

    Args:
        folder: made where it is not there; files of an older head are replaced.
        config: the head's; the dtype that is written is that of `state`.
        state: tensors under their published names.

    Raises:
        ValueError: `state` has not exactly the published keys and shapes.
    """
    from safetensors.torch import save_file

    with torch.device("meta"):
        head = DraftHead(config, TpGroup.single(), torch.device("meta"))
    expected = {name: shape for name, shape, *_ in head.pieces()}
    check_names(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = head_config_json(config) | {"dtype": str(tensors["norm.weight"].dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(written, indent=1))


def _fill(
    model: TargetEnds | DraftFuser,
    folder: Path,
    dtype: torch.dtype | None,
    config_dtype: str | None,
    device: torch.device,
    ignored: tuple[str, ...],
    *,
    partial: bool = False,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Replaces the meta tensors of `model` by the checkpoint's, which may hold more only where `model` is a part."""
    with StoredTensors.of_checkpoint(folder) as stored:
        pieces = list(model.pieces())
        expected = {name: shape for name, shape, *_ in pieces}
        found = {n: s for n, s in stored.shapes.items() if n not in ignored and not n.endswith(_DERIVED)}
        if partial:
            found = {name: shape for name, shape in found.items() if name in expected}
        check_names(expected, found, folder)
        if dtype is None:
            dtype = getattr(torch, config_dtype) if config_dtype else stored.dtype_of(pieces[0][0])
        model.to(dtype)
        if device.type != "meta":
            # As `to_empty` does, whose copies of tensors on the meta device have torch load sympy.
            model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
            with torch.no_grad():
                _read_pieces(list(model.pieces()), stored, folder, rounded_to)
            for module in model.modules():
                if isinstance(module, (Linear, ParallelLmHead)):
                    module.pack()
    model.eval()


def _read_pieces(pieces: Sequence[Piece], stored: StoredTensors, folder: Path, rounded_to: torch.dtype | None) -> None:
    progress = LoadProgress(str(folder), sum(destination.nbytes for *_, destination in pieces))
    for name, _, slices, destination in pieces:
        values = stored.read(name, slices)
        destination.copy_(values if rounded_to is None else values.to(rounded_to))
        progress.loaded(destination.nbytes)
    progress.end()
