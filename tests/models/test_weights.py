"""Files of tensors: dtypes, broken files, what is read of them, and side-cars that belong to others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jetflow_cluster.models.loader import load_draft_head, load_sidecar, load_target, save_draft_head
from jetflow_cluster.models.sidecar import SideCar, SideCarConfig, fingerprint, save_sidecar
from jetflow_cluster.models.weights import StoredTensors
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.tree.coupled import conditional_scores
from support.small_models import write_head, write_target

CPU = torch.device("cpu")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def target_dir(tmp_path: Path) -> Path:
    return write_target(tmp_path, dtype=torch.bfloat16)


@pytest.fixture
def head_dir(target_dir: Path) -> Path:
    (target_dir / "head").mkdir()
    return write_head(target_dir / "head", target_dir)


@pytest.mark.parametrize("said", ["bfloat16", None], ids=["said", "unsaid"])
@pytest.mark.parametrize(
    "dtype, expected",
    [(None, torch.bfloat16), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=["auto", "fp32", "fp64"],
)
def test_weights_have_the_dtype_that_was_asked_for(
    target_dir: Path, said: str | None, dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    _edit(target_dir / "config.json", dtype=said)
    model = load_target(target_dir, dtype=dtype, device=CPU, tp=TpGroup.single())
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    stored = load_file(target_dir / "model.safetensors")
    assert torch.equal(model.embedding.weight, stored["model.embed_tokens.weight"].to(expected))


def test_every_tensor_arrives(target_dir: Path) -> None:
    stored = load_file(target_dir / "model.safetensors")
    model = load_target(target_dir, dtype=None, device=CPU, tp=TpGroup.single())
    for name, _, slices, destination in model.pieces():
        assert torch.equal(destination, stored[name][slices].expand_as(destination)), name


def test_tied_checkpoints_may_hold_the_output_layer_and_old_ones_frequencies(target_dir: Path) -> None:
    state = load_file(target_dir / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, target_dir / "model.safetensors")
    _edit(target_dir / "config.json", tie_word_embeddings=True)
    model = load_target(target_dir, dtype=None, device=CPU, tp=TpGroup.single())
    assert model.lm_head.weight is model.embedding.weight


def _index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _pickle_in_index(folder: Path) -> None:
    _index(folder, {"model.norm.weight": "pytorch_model.bin"})


def _file_elsewhere(folder: Path) -> None:
    _index(folder, {"model.norm.weight": "../model.safetensors"})


def _twice(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "b.safetensors")
    _index(folder, {"x": "model.safetensors", "y": "b.safetensors"})


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _not_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    "break_it, message",
    [
        (_pickle_in_index, r"names pytorch_model\.bin: only \.safetensors files beside it"),
        (_file_elsewhere, r"names \.\./model\.safetensors: only"),
        (_twice, "is in another file too"),
        (_cut, r"model\.safetensors: "),
        (_not_tensors, r"model\.safetensors: "),
    ],
    ids=["pickle", "elsewhere", "twice", "cut", "no-tensors"],
)
def test_broken_checkpoints(target_dir: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(target_dir)
    with pytest.raises(ValueError, match=message):
        load_target(target_dir, dtype=None, device=CPU, tp=TpGroup.single())


def test_a_rank_reads_its_slice_alone(target_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}
    original = StoredTensors.read

    def counted(self: StoredTensors, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        part = original(self, name, slices)
        read[name] = part.numel()
        return part

    monkeypatch.setattr(StoredTensors, "read", counted)
    load_target(target_dir, dtype=torch.float32, device=CPU, tp=TpGroup(1, 4))
    full = {name: tensor.numel() for name, tensor in load_file(target_dir / "model.safetensors").items()}
    for name, count in read.items():
        # Two KV heads on four ranks: each rank holds one.
        share = 1 if "norm" in name else 2 if "k_proj" in name or "v_proj" in name else 4
        assert count * share == full[name], name
    assert read.keys() == full.keys()


def test_the_output_of_saving_a_head_is_its_dtype(head_dir: Path, tmp_path: Path) -> None:
    target = load_target(head_dir.parent, dtype=None, device=CPU, tp=TpGroup.single())
    head = load_draft_head(head_dir, target, device=CPU, tp=TpGroup.single())
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    state = {name: tensor.half() for name, tensor in load_file(head_dir / "model.safetensors").items()}
    save_draft_head(tmp_path / "half", head.config, state)
    alone = load_draft_head(tmp_path / "half", target.config, device=CPU, tp=TpGroup.single())
    assert {p.dtype for p in alone.parameters()} == {torch.float16}
    state["hidden_dim_adapter.proj.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected hidden_dim_adapter\.proj\.weight"):
        save_draft_head(tmp_path / "other", head.config, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2), (3, 4)], ids=str)
def test_sidecar_is_known_in_every_dtype_and_on_every_rank(
    head_dir: Path, dtype: torch.dtype, rank: int, size: int
) -> None:
    target = load_target(head_dir.parent, dtype=dtype, device=CPU, tp=TpGroup(rank, size))
    sidecar = load_sidecar(head_dir, target, device=CPU)
    assert sidecar is not None
    stored = load_file(head_dir / "sidecar.safetensors")
    assert torch.equal(sidecar.parent, stored["parent.weight"])
    assert torch.equal(sidecar.child, stored["child.weight"])


def _other_target(folder: Path) -> None:
    state = load_file(folder.parent / "model.safetensors")
    state["model.embed_tokens.weight"][7, 3] += 1
    save_file(state, folder.parent / "model.safetensors")


def _other_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["fc.weight"][7, 3] += 1
    save_file(state, folder / "model.safetensors")


def _other_rank(folder: Path) -> None:
    _edit(folder / "sidecar_config.json", rank=5)


def _other_names(folder: Path) -> None:
    save_file({"weight": torch.zeros(2)}, folder / "sidecar.safetensors")


def _no_weights(folder: Path) -> None:
    (folder / "sidecar.safetensors").unlink()


def _unknown_field(folder: Path) -> None:
    _edit(folder / "sidecar_config.json", depth=3)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (_other_target, "target_fingerprint = .*, the target's is "),
        (_other_head, "head_fingerprint = .*, the head's is "),
        (_other_rank, r"child\.weight is \[288, 4\], not \[288, 5\]"),
        (_other_names, r"missing child\.weight; missing parent\.weight; unexpected weight"),
        (_no_weights, "sidecar"),
        (_unknown_field, "depth"),
    ],
    ids=["target", "head", "rank", "names", "no-weights", "field"],
)
def test_sidecars_that_do_not_belong(head_dir: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(head_dir)
    target = load_target(head_dir.parent, dtype=None, device=CPU, tp=TpGroup.single())
    with pytest.raises(ValueError, match=message):
        load_sidecar(head_dir, target, device=CPU)


def test_sidecar_corrects_by_its_factors_and_is_saved(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parent, child = torch.randn(2, 11, 3, generator=generator)
    config = SideCarConfig(rank=3, width=4, target_fingerprint="t", head_fingerprint="h")
    sidecar = SideCar(config, parent, child)
    ids = torch.tensor([[[1, 2], [3, 10], [0, 4]]])
    flat = torch.full((1, 3, 2), -1.0)
    out = conditional_scores(ids, flat, sidecar, None)
    assert out.shape == (1, 3, 2, 2)
    for d in (1, 2):
        for p in range(2):
            own, other = (parent[ids[0, d - 1, p]] @ child[ids[0, d, w]] for w in range(2))
            assert float(out[0, d, p, 0] - out[0, d, p, 1]) == pytest.approx(float(own - other), abs=1e-5)
    save_sidecar(tmp_path, sidecar)
    assert sorted(load_file(tmp_path / "sidecar.safetensors")) == ["child.weight", "parent.weight"]
    assert json.loads((tmp_path / "sidecar_config.json").read_text())["rank"] == 3
    with pytest.raises(ValueError, match=r"both must be \[vocab_size, rank = 3\]"):
        SideCar(config, parent, child[:, :2])


def test_fingerprint_outlives_dtypes_but_not_values_or_names() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = fingerprint({"a": weight})
    assert fingerprint({"a": weight.double()}) == fingerprint({"a": weight.float()}) == base
    assert len({base, fingerprint({"b": weight}), fingerprint({"a": weight.T}), fingerprint({"a": weight * 2})}) == 4
