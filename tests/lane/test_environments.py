"""On machines that are set up otherwise, a newcomer's first command works and gives the same tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jetflow_cluster import LLM, RequestOutput, SamplingParams
from support.lane_run import has_compiler

pytestmark = pytest.mark.lane

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 8
PROMPT, FOREIGN = "def f(x):", "# Größe → 猫 «é»"
#: Neither root nor anybody else makes folders here.
NOT_WRITABLE = "/sys/kernel"
#: As where no locale is installed; Python is kept from taking UTF-8 all the same.
NO_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def generate(
    prompt: str, options: Sequence[str], variables: dict[str, str], cwd: Path, package: Path = ROOT
) -> tuple[str, str]:
    """What ``jetflow generate`` of a checkout writes to standard output and to standard error, in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHON"))}
    environment |= {"PYTHONPATH": os.pathsep.join((str(package), str(package / "kernels")))} | variables
    command = [sys.executable, "-m", "jetflow_cluster", "generate", prompt, "--max-tokens", str(NUM_TOKENS), *options]
    done = subprocess.run(
        [word.encode() for word in command], env=environment, cwd=cwd, capture_output=True, timeout=300
    )
    output, errors = done.stdout.decode("ascii", "surrogateescape"), done.stderr.decode(errors="replace")
    assert done.returncode == 0, output + errors
    assert "Traceback" not in errors
    if not has_compiler():
        errors = "".join(line for line in errors.splitlines(True) if "no C compiler" not in line)
    return output, errors


@pytest.fixture(scope="module")
def plain() -> dict[str, RequestOutput]:
    """What this process gives, by prompt."""
    llm = LLM(tree_nodes={1: 1})
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    return dict(zip((PROMPT, FOREIGN), llm.generate([PROMPT, FOREIGN], params), strict=True))


def test_home_and_cache_that_cannot_be_written(tmp_path: Path, plain: dict[str, RequestOutput]) -> None:
    variables = {"HOME": NOT_WRITABLE, "JETFLOW_CACHE_DIR": f"{NOT_WRITABLE}/cache"}
    output, errors = generate(PROMPT, ["--json"], variables, tmp_path)
    assert json.loads(output)["token_ids"] == plain[PROMPT].token_ids
    # Each line says so.
    assert [line for line in errors.splitlines() if "not kept" in line] == errors.splitlines() != []


def test_checkout_and_cache_in_paths_with_spaces(tmp_path: Path, plain: dict[str, RequestOutput]) -> None:
    package, cache = tmp_path / "a check out", tmp_path / "a cache"
    for name in ("jetflow_cluster", "kernels"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    output, errors = generate(PROMPT, ["--json"], {"JETFLOW_CACHE_DIR": str(cache)}, tmp_path, package)
    assert json.loads(output)["token_ids"] == plain[PROMPT].token_ids
    assert errors == "" and list(cache.glob("costs/*.json"))
    assert bool(list(cache.glob("kernels/*.so"))) is has_compiler()


@pytest.mark.parametrize("options", [["--json"], ["--stats", "--speculation", "off"]], ids=["json", "text"])
def test_text_where_there_is_no_locale(tmp_path: Path, plain: dict[str, RequestOutput], options: list[str]) -> None:
    output, _ = generate(FOREIGN, options, NO_LOCALE, tmp_path)
    assert output.isascii()
    expected = plain[FOREIGN]
    assert not expected.text.isascii(), "the case needs an output that ASCII cannot hold"
    if "--json" in options:
        assert json.loads(output)["prompt_token_ids"] == expected.prompt_token_ids
        assert json.loads(output)["text"] == expected.text
    else:
        assert output.rstrip("\n") == expected.text.encode("ascii", "backslashreplace").decode().rstrip("\n")
