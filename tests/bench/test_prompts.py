from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jetflow_cluster.bench.prompts import load_prompts


@pytest.fixture(scope="module")
def tokenizer(tiny_target_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_target_dir / "tokenizer.json"))


@pytest.mark.parametrize(
    "name, content, texts",
    [
        pytest.param("p.txt", "one\ntwo\n---\nthree\n", ["one\ntwo", "three"], id="text"),
        pytest.param("p.txt", "---\none\n---\n---\n", ["one"], id="text-with-empty-parts"),
        pytest.param("p.json", json.dumps(["a", "b"]), ["a", "b"], id="json-strings"),
        pytest.param("p.json", json.dumps([{"name": "n", "text": "a", "token_ids": [1]}]), ["a"], id="json-objects"),
    ],
)
def test_prompts_are_read(tokenizer: Tokenizer, tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_text(content)
    prompts = load_prompts(tmp_path / name, tokenizer, max_prompts=9, max_prompt_tokens=99)
    assert [prompt.text for prompt in prompts] == texts
    assert [prompt.token_ids for prompt in prompts] == [tokenizer.encode(text).ids for text in texts]


def test_limits_cut_prompts_at_the_left(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(["abcdef", "x", "y"]))
    prompts = load_prompts(tmp_path / "p.json", tokenizer, max_prompts=2, max_prompt_tokens=3)
    assert [prompt.token_ids for prompt in prompts] == [tokenizer.encode("def").ids, tokenizer.encode("x").ids]


@pytest.mark.parametrize(
    "content, message",
    [("[]", "holds none"), ("{}", "must hold a JSON list"), ("[3]", "neither a string nor an object")],
    ids=["empty", "no-list", "numbers"],
)
def test_bad_files_are_named(tokenizer: Tokenizer, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "p.json", tokenizer, max_prompts=9, max_prompt_tokens=99)


def test_missing_things_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_prompts(tmp_path / "none.json", tokenizer, max_prompts=9, max_prompt_tokens=99)
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_prompts(tmp_path / "p.txt", None, max_prompts=9, max_prompt_tokens=99)
