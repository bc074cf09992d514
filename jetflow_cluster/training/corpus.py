"""The training corpus of the embedded default: the Python standard library and its documentation.

Files are split into train, validation and test by a hash of their name, after near-duplicates
(estimated Jaccard similarity of their lines of at least 0.7) were removed, so no held-out file has a
twin in the training part. Files that say that a program generated them are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
MASK_TOKEN = "<|mask|>"
VOCAB_SIZE = 4096
SPLITS = ("train", "validation", "test")
#: Share of each source in the target's training windows; library code is what users complete.
MIXTURE = {"library": 0.72, "documentation": 0.10, "tests": 0.18}
MIN_FILE_CHARS = 400
MAX_LINE_CHARS = 1000
DUPLICATE_SIMILARITY = 0.7

#: What the first lines of tables that a program wrote say, such as those of character mappings.
_GENERATED = re.compile(r"generated (?:from|by|with)", re.IGNORECASE)
_DOCUMENTATION_PACKAGE = "python3.11-doc"
#: Identifiers with one leading sign, digits one by one, indentation as one piece, newlines apart.
_PIECES = r"(?:\r?\n)+|[ \t]{2,}(?=\S)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One text of the corpus."""

    #: Unique name, such as ``library/json/decoder.py``.
    name: str
    #: ``library``, ``documentation`` or ``tests``.
    source: str
    #: ``train``, ``validation`` or ``test``.
    split: str
    text: str


def split_of(name: str) -> str:
    """The split of a file, a pure function of its name: about 92 % train, 3 % validation, 5 % test."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if bucket < 5 else "validation" if bucket < 8 else "train"


def collect(documentation_dir: Path | None = None) -> list[SourceFile]:
    """Reads the standard library of the running Python, and its documentation.

    Args:
        documentation_dir: a folder of ``.rst`` or ``.rst.txt`` sources; None takes them from the
            installed documentation package, or downloads that package where ``apt-get`` exists,
            or goes on without.

    Returns:
        Files in the order of their names, near-duplicates removed.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found: list[SourceFile] = []
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if "site-packages" in parts or "__pycache__" in parts or parts[0].startswith("_sysconfigdata"):
            continue
        is_test = any(p in ("test", "tests", "idle_test") for p in parts)
        found += _read(path, "tests" if is_test else "library", "/".join(parts))
    if documentation_dir is not None:
        found += _read_documentation(documentation_dir)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _find_documentation(Path(scratch))
            found += _read_documentation(folder) if folder else []
    return _without_near_duplicates(found)


def _read(path: Path, source: str, relative: str) -> list[SourceFile]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return []
    longest = max((len(line) for line in text.splitlines()), default=0)
    if len(text) < MIN_FILE_CHARS or longest > MAX_LINE_CHARS or "\0" in text or _GENERATED.search(text[:300]):
        return []
    name = f"{source}/{relative}"
    return [SourceFile(name=name, source=source, split=split_of(name), text=text)]


def _read_documentation(folder: Path) -> list[SourceFile]:
    files: list[SourceFile] = []
    for path in sorted(p for p in folder.rglob("*.rst*") if p.name.endswith((".rst", ".rst.txt"))):
        files += _read(path, "documentation", str(path.relative_to(folder)))
    return files


def _find_documentation(scratch: Path) -> Path | None:
    installed = Path("/usr/share/doc/python3.11/html/_sources")
    if installed.is_dir():
        return installed
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    steps = [["apt-get", "download", _DOCUMENTATION_PACKAGE]]
    if subprocess.run(steps[0], cwd=scratch, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        if subprocess.run(steps[0], cwd=scratch, capture_output=True, check=False).returncode:
            return None
    package = next(scratch.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / "x")], check=True)
    return next((p for p in (scratch / "x").rglob("_sources") if p.is_dir()), None)


def _without_near_duplicates(files: list[SourceFile]) -> list[SourceFile]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=DUPLICATE_SIMILARITY, num_perm=64)
    kept: list[SourceFile] = []
    # Library files go first, so that a copy elsewhere is the one to drop.
    order = sorted(files, key=lambda f: (f.source != "library", f.name))
    for file in track(order, description="near-duplicates"):
        lines = {line.strip() for line in file.text.splitlines()}
        signature = MinHash(num_perm=64)
        signature.update_batch([line.encode() for line in lines if len(line) > 3])
        if not index.query(signature):
            index.insert(file.name, signature)
            kept.append(file)
    return sorted(kept, key=lambda f: f.name)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE for code. Ids 0 and 1 are the end-of-text and the mask token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(output: Path, documentation_dir: Path | None = None) -> dict[str, object]:
    """Writes ``tokenizer.json``, one ``{split}.{source}.bin`` of uint16 ids per part (files ended by
    the end-of-text id), and ``corpus.json``: every file with its split, and the totals.

    Nothing is done when ``corpus.json`` exists already; a ``tokenizer.json`` that is there is kept.
    """
    manifest_path = output / "corpus.json"
    if manifest_path.exists():
        return dict(json.loads(manifest_path.read_text()))
    output.mkdir(parents=True, exist_ok=True)
    files = collect(documentation_dir)
    tokenizer_path = output / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(f.text for f in files if f.split == "train" and f.source != "tests")
        tokenizer.save(str(tokenizer_path))
    totals: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        for source in MIXTURE:
            part = [f for f in files if f.split == split and f.source == source]
            ids = [e.ids for e in tokenizer.encode_batch([f.text for f in part], add_special_tokens=False)]
            flat = np.array([i for one in ids for i in (*one, 0)], dtype=np.uint16)
            flat.tofile(output / f"{split}.{source}.bin")
            size = sum(len(f.text.encode()) for f in part)
            totals[f"{split}.{source}"] = {"files": len(part), "bytes": size, "tokens": int(flat.size)}
    held_out = [asdict(f) for f in files if f.split != "train" and f.source == "library"]
    (output / "held_out.json").write_text(json.dumps(held_out))
    manifest: dict[str, object] = {
        "totals": totals,
        "files": {f.name: f.split for f in files},
        "licence": "Python Software Foundation License Version 2",
    }
    manifest_path.write_text(json.dumps(manifest, indent=1))
    return manifest


def function_headers(text: str) -> list[int]:
    """Character offsets just behind each ``def`` line that has a body of four lines or more."""
    header_and_body = r"^[ ]*def [^\n]*:\n(?=(?:[ ]+[^\n]*\n|\n){4})"
    return [match.end() for match in re.finditer(header_and_body, text, re.MULTILINE)]
