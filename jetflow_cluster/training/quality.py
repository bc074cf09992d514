"""Is the embedded target worth serving: bits per byte, and what its continuations of held-out functions look like.

Run as ``python -m jetflow_cluster.training.quality``.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jetflow_cluster.training.corpus import MIXTURE, function_headers
from jetflow_cluster.training.pretrain import bits_per_byte, distinct_4grams
from jetflow_cluster.training.regenerate import (
    check_same_tokenizer,
    continue_prompts,
    load_causal_lm,
    load_tokenizer,
)

END_OF_TEXT_ID = 0
#: Enough for all held-out library files; of the larger parts the beginning is taken.
MAX_TOKENS_OF_A_PART = 80_000


def held_out_functions(corpus_dir: Path, num: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Name, text up to and with the header line, and header line, of functions in held-out library files.

    As evenly over files as their functions allow.
    """
    files = [f for f in json.loads((corpus_dir / "held_out.json").read_text()) if f["source"] == "library"]
    rng = np.random.default_rng(seed)
    queues = []
    for file in files:
        offsets = function_headers(file["text"])
        order = rng.permutation(len(offsets))
        queues.append([(f"{file['name']}:{offsets[i]}", file["text"][: offsets[i]]) for i in order])
    found: list[tuple[str, str, str]] = []
    while len(found) < num and any(queues):
        for queue in queues:
            if queue:
                name, text = queue.pop()
                found.append((name, text, text.splitlines()[-1] + "\n"))
    return found[:num]


def parses(header: str, body: str) -> bool:
    """True when the header and the body up to its last whole line are Python.

    The header's indentation is kept, and opened by one class per level, so that a continuation may go on with a
    sibling or leave the enclosing class, as it may in its file.
    """
    whole = body[: body.rfind("\n") + 1]
    indent = len(header) - len(header.lstrip(" "))
    steps = range(0, indent, 4)
    opening = "".join(" " * level + "class _:\n" for level in steps)
    if not whole.strip():
        return False
    try:
        ast.parse(opening + header + whole)
    except (SyntaxError, ValueError):
        return False
    return True


def own_lines(header: str, continuation: str) -> str:
    """The part of a continuation that belongs to the function: up to the first line as far left as the header."""
    indent = len(header) - len(header.lstrip(" "))
    kept = []
    for line in continuation.splitlines(keepends=True):
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent:
            break
        kept.append(line)
    return "".join(kept)


def held_out_text(corpus_dir: Path, functions: list[tuple[str, str, str]], tokenizer: Any, num: int) -> list[str]:
    """What really follows each of `held_out_functions`, `num` tokens of it: the measure of the measures."""
    files = {f["name"]: f["text"] for f in json.loads((corpus_dir / "held_out.json").read_text())}
    found = []
    for name, text, _ in functions:
        rest = files[name.rpartition(":")[0]][len(text) : len(text) + 16 * num]
        found.append(tokenizer.decode(tokenizer.encode(rest, add_special_tokens=False).ids[:num]))
    return found


def continuations(target: Path, corpus_dir: Path, *, num: int, num_tokens: int) -> list[dict[str, Any]]:
    """Greedy continuations behind the headers of held-out functions, from up to 256 tokens of their files."""
    tokenizer = load_tokenizer(target)
    functions = held_out_functions(corpus_dir, num)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[-256:] for _, text, _ in functions]
    longest = max(map(len, ids))
    starts = np.array([longest - len(one) for one in ids])
    prompts = np.array([[END_OF_TEXT_ID] * s + one for s, one in zip(starts, ids, strict=True)])
    model = load_causal_lm(target, torch.float32)
    made = continue_prompts(model, prompts, num_tokens, starts=starts)[:, longest:].tolist()
    rows = []
    real = held_out_text(corpus_dir, functions, tokenizer, num_tokens)
    for (name, _, header), new, true in zip(functions, made, real, strict=True):
        if END_OF_TEXT_ID in new:
            new = new[: new.index(END_OF_TEXT_ID)]
        text = tokenizer.decode(new)
        row = {"name": name, "header": header, "continuation": text, "distinct_4grams": distinct_4grams(new)}
        row |= {"function_parses": parses(header, own_lines(header, text)), "all_parses": parses(header, text)}
        row |= {"real_function_parses": parses(header, own_lines(header, true)), "real_parses": parses(header, true)}
        rows.append(row)
    return rows


def measure_quality(target: Path, corpus_dir: Path, *, num: int = 100, num_tokens: int = 96) -> dict[str, Any]:
    """Bits per byte of every held-out part, the share of continuations that parse, mean distinct 4-grams, and the
    continuations themselves.

    Raises:
        ValueError: the corpus was encoded with another tokenizer than the target's.
    """
    check_same_tokenizer(corpus_dir, target)
    model = load_causal_lm(target, torch.float32)
    bits = {
        f"test.{source}": round(bits_per_byte(model, corpus_dir, "test", source, MAX_TOKENS_OF_A_PART), 4)
        for source in MIXTURE
    }
    rows = continuations(target, corpus_dir, num=num, num_tokens=num_tokens)
    return {
        "bits_per_byte": bits,
        "functions": len(rows),
        "tokens_each": num_tokens,
        # Of the lines that belong to the function, and of all that was generated, cut at the last whole line; beside
        # each, what the same measure says of the text that people wrote.
        "share_that_parses": sum(r["function_parses"] for r in rows) / len(rows),
        "share_that_parses_of_real_text": sum(r["real_function_parses"] for r in rows) / len(rows),
        "share_that_parses_uncut": sum(r["all_parses"] for r in rows) / len(rows),
        "share_that_parses_uncut_of_real_text": sum(r["real_parses"] for r in rows) / len(rows),
        "distinct_4grams": round(sum(r["distinct_4grams"] for r in rows) / len(rows), 4),
        "continuations": rows,
    }


def main() -> None:
    """Writes ``quality.json``."""
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", (__doc__ or "").split("\n\n")[0]))
    parser.add_argument("--train-dir", type=Path, default=Path("build/train"), help="folder of `make train`")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each continuation")
    arguments = parser.parse_args()
    folder: Path = arguments.train_dir
    found = measure_quality(folder / "target", folder / "corpus", num_tokens=arguments.tokens)
    (folder / "quality.json").write_text(json.dumps(found, indent=1))
    Console().print_json(data={k: v for k, v in found.items() if k != "continuations"})


if __name__ == "__main__":
    main()
