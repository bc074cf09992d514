"""Checkpoints, certificates and other files, each with one fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.certificates import Files

_WEIGHTS = "model.safetensors"


def write_faulty_files(folder: Path, target: Path, head: Path) -> None:
    """Into `folder`, by the names that the table of failed starts has for them.

    Args:
        folder: where they go.
        target: of `write_target`, without faults.
        head: a head for it.
    """
    for name, source in {"target": target, "head": head}.items():
        shutil.copytree(source, folder / name)
    for name, (source, break_it) in _FAULTS.items():
        shutil.copytree(folder / source, folder / name)
        break_it(folder / name)
    _write_keys(folder)
    (folder / "short.yaml").write_text("- {name: one, token: abc}\n")
    (folder / "broken.yaml").write_text("applications: [}")


def _edit(file: str, **fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def _cut(folder: Path) -> None:
    whole = (folder / _WEIGHTS).read_bytes()
    (folder / _WEIGHTS).write_bytes(whole[: len(whole) - 100])


def _name_a_missing_file(folder: Path) -> None:
    names = {"a": _WEIGHTS, "b": "model-2.safetensors"}
    (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))


def _put_a_folder(folder: Path) -> None:
    (folder / _WEIGHTS).unlink()
    (folder / _WEIGHTS).mkdir()


def _pickle(folder: Path) -> None:
    (folder / _WEIGHTS).rename(folder / "pytorch_model.bin")


def _lie(folder: Path) -> None:
    content = (folder / _WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["lm_head.weight"]["shape"] = [2**40, 2**40]
    told = json.dumps(header).encode()
    (folder / _WEIGHTS).write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])


def _announce_without_end(folder: Path) -> None:
    (folder / _WEIGHTS).write_bytes((2**63 - 1).to_bytes(8, "little") + b"{" * 100)


def _write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


#: By the folder's name: which one is copied, and what is done to it.
_FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "other-head": ("head", _edit("config.json", num_target_layers=2)),
    "sidecar": ("head", _edit("sidecar_config.json", head_fingerprint="0")),
    "cut": ("target", _cut),
    "gap": ("target", _name_a_missing_file),
    "hollow": ("target", _put_a_folder),
    "misshapen": ("target", _edit("config.json", intermediate_size=64)),
    "pickled": ("target", _pickle),
    "remote-code": ("target", _edit("config.json", architectures=["OwnForCausalLM"], auto_map={"AutoModel": "x.Y"})),
    "absurd": ("target", _edit("config.json", num_hidden_layers=10**9)),
    "wordy": ("target", _edit("config.json", hidden_size="many")),
    "lying": ("target", _lie),
    "endless": ("target", _announce_without_end),
    "garbled": ("target", _write("config.json", "{not json")),
    "nested": ("target", _write("config.json", "[" * 200_000)),
    "mute": ("target", _write("tokenizer.json", "{}")),
    "long": ("target", _edit("config.json", max_position_embeddings=2**31 - 1)),
}


def _write_keys(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    files = Files(folder)
    key = s.load_pem_private_key(files.key.read_bytes(), None)
    pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"password"))
    (folder / "locked-key.pem").write_bytes(pem)
    held = files.cert.read_bytes(), files.key.read_bytes()
    files.renew()
    files.key.rename(folder / "other-key.pem")
    files.cert.write_bytes(held[0])
    files.key.write_bytes(held[1])
