"""What importing loads, and that the rules of imports hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jetflow_cluster

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "tokenizers", "numpy", "ray", "grpc", "triton", "matplotlib")


def run_python(code: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    return set(run_python(f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})").split())


@pytest.mark.parametrize(
    "statement, allowed",
    [
        pytest.param("import jetflow_cluster", (), id="package"),
        pytest.param("from jetflow_cluster import SamplingParams, RequestOutput", (), id="types"),
        pytest.param("from jetflow_cluster import EngineConfig", (), id="config"),
        pytest.param("import jetflow_cluster.cli", (), id="command-line"),
        pytest.param("import jetflow_cluster.rpc.client, jetflow_cluster.bench.terminal", ("grpc",), id="client"),
        pytest.param("from jetflow_cluster import LLM, AsyncLLM", ("torch", "numpy", "tokenizers"), id="engine"),
    ],
)
def test_imports_load_no_more_than_they_need(statement: str, allowed: tuple[str, ...]) -> None:
    assert loaded_by(statement) & set(HEAVY) <= set(allowed)


def test_kernels_load_nothing_of_the_project() -> None:
    assert "jetflow_cluster" not in loaded_by("import jetflow_kernels, jetflow_kernels.tree_attention")


@pytest.mark.parametrize("name", sorted(jetflow_cluster.__all__))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(jetflow_cluster, name) is not None
    assert name in dir(jetflow_cluster)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = jetflow_cluster.Nonsense


def test_import_contracts() -> None:
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    assert "0 broken" in run_python(code)


@pytest.mark.parametrize("path", ["pyproject.toml", "Makefile", ".ci/run", "LICENSE", "README.md", "ARCHITECTURE.md"])
def test_project_files_are_there(path: str) -> None:
    assert (ROOT / path).stat().st_size > 0


def test_torch_range_of_the_makefile_is_that_of_the_package() -> None:
    import tomllib

    (wanted,) = [
        requirement
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if requirement.startswith("torch")
    ]
    shown = subprocess.run(["make", "-pn", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert f'TORCH_ARGS := "{wanted}"' in shown


def test_engine_kernels_and_their_tests_need_no_ray_and_no_grpc() -> None:
    # What a machine with a GPU need not have, where the tests of `make test-gpu` run from a checkout.
    absent = ("ray", "grpc", "google", "typer", "rich", "matplotlib", "hypothesis", "allpairspy", "scipy", "datasketch")
    run_python(
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\nsys.path.insert(0, 'tests')\n"
        "import jetflow_kernels.aot, jetflow_kernels.warmup\n"
        "import gpu.conftest, gpu.test_lossless, gpu.test_ranks, support.attention_batches, support.rope_rows\n"
        "from jetflow_cluster import LLM, SamplingParams\n"
        "assert LLM(dtype='float32', num_pages=64, tree_nodes={1: 4}).generate([[1]], SamplingParams(max_tokens=2))"
    )
