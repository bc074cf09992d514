"""A checkpoint's tokenizer. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Of the folder's ``tokenizer.json``; None where there is none.

    Raises:
        ValueError: the file is no tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library has no class of its own for this.
        raise ValueError(f"{path}: is no tokenizer: {error}") from None
