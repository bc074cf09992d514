"""The prompts that every system completes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "default"
HELD_OUT_PROMPTS = DEFAULT_CHECKPOINT / "held_out_prompts.json"


@dataclass(frozen=True, kw_only=True)
class BenchPrompt:
    """One prompt."""

    #: Where it comes from, such as a file's name.
    name: str
    text: str
    #: At least one id.
    token_ids: list[int]


def load_prompts(
    path: Path | None, tokenizer: Tokenizer | None, *, max_prompts: int, max_prompt_tokens: int
) -> list[BenchPrompt]:
    """Prompts of a file, or the embedded held-out ones, cut at the left to `max_prompt_tokens`.

    Args:
        path: a JSON list of strings or of objects with ``text`` (and ``name``), or a text file with prompts
            divided by lines of ``---``; None takes the prompts that came with the embedded default.
        tokenizer: of the target; texts are encoded with it, whatever ids the file may hold.
        max_prompts: most prompts to return.
        max_prompt_tokens: longest prompt.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file holds no prompt, or there is no tokenizer.
    """
    source = HELD_OUT_PROMPTS if path is None else path
    if not source.is_file():
        hint = "; give a file of prompts" if path is None else ""
        raise FileNotFoundError(f"prompts: no file at {source}{hint}")
    if tokenizer is None:
        raise ValueError("prompts: the model has no tokenizer.json, so texts cannot be encoded")
    prompts = []
    for name, text in _read(source)[:max_prompts]:
        token_ids = list(tokenizer.encode(text).ids)[-max_prompt_tokens:]
        if token_ids:
            prompts.append(BenchPrompt(name=name, text=text, token_ids=token_ids))
    if not prompts:
        raise ValueError(f"prompts: {source} holds none")
    return prompts


def _read(path: Path) -> list[tuple[str, str]]:
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        texts = [part.strip("\n") for part in re.split(r"^---[ \t]*$", content, flags=re.MULTILINE)]
        return [(f"{path.name}:{i}", text) for i, text in enumerate(texts) if text]
    entries = json.loads(content)
    if not isinstance(entries, list):
        raise ValueError(f"prompts: {path} must hold a JSON list")
    found = []
    for i, entry in enumerate(entries):
        is_text = isinstance(entry, str)
        if not is_text and not (isinstance(entry, dict) and isinstance(entry.get("text"), str)):
            raise ValueError(f"prompts: entry {i} of {path} is neither a string nor an object with text")
        found.append((f"{path.name}:{i}", entry) if is_text else (str(entry.get("name", i)), entry["text"]))
    return found
