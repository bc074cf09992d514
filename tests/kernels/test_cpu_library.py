"""How the functions of CPUs are compiled, kept and found again, and that nothing fails where they cannot be."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from jetflow_kernels.cpu import compiler, cpu_kernels, library
from jetflow_kernels.machine import find_compiler, machine
from jetflow_kernels.pointwise import rms_norm

_ASK = """
import torch
from jetflow_kernels.cpu import cpu_kernels, rows
out = rows.rms_norm(torch.ones(1, 8), torch.ones(8), 0.0)
print(out is not None and bool((out == 1).all()), cpu_kernels().detail)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has not looked for functions yet."""
    monkeypatch.setenv("JETFLOW_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "_found", None)
    return tmp_path / "kernels"


@pytest.fixture(scope="module")
def needs_compiler() -> None:
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler")


def norms_by_torch() -> bool:
    """True if a norm is right, and no compiled function made it."""
    x = torch.arange(1.0, 9.0)[None]
    wanted = x / x.pow(2).mean().sqrt()
    return torch.allclose(rms_norm(x, torch.ones(8), 0.0), wanted) and cpu_kernels().functions is None


def broken_compiler(folder: Path) -> Path:
    """A program that tells its version and compiles nothing."""
    program = folder / "broken-cc"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no space >&2; exit 3\n')
    program.chmod(0o755)
    return program


def test_the_variable_turns_them_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETFLOW_CPU_KERNELS", "0")
    assert norms_by_torch()
    assert cpu_kernels().detail == "off: JETFLOW_CPU_KERNELS=0"
    assert not folder.exists()


def test_without_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert norms_by_torch() and norms_by_torch()
    assert [record.message for record in caplog.records] == [
        "no compiled CPU kernels, plain torch instead: no C compiler: neither CC nor cc nor gcc is there"
    ]


def test_a_compiler_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", str(broken_compiler(tmp_path)))
    with caplog.at_level(logging.WARNING):
        assert norms_by_torch()
    assert len(caplog.records) == 1 and "failed with 3: no space" in caplog.text
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def compiled(needs_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of the machine's compiler."""
    path = tmp_path_factory.mktemp("compiled") / "library.so"
    compiler.build(find_compiler(), machine().kernel_isa, (), path)
    return path


@pytest.mark.usefixtures("needs_compiler")
class TestCompiled:
    """With the machine's compiler."""

    def test_what_was_compiled_is_loaded_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert library.load_cpu_kernels().functions is not None
        assert len(list(folder.iterdir())) == 1

        def refuse(*_: object) -> None:
            raise AssertionError("compiled again")

        monkeypatch.setattr(library, "build", refuse)
        assert library.load_cpu_kernels().functions is not None

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"\x7fELF" + bytes(5000), id="cut-short"),
            pytest.param(b"text" + hashlib.sha256(b"text").digest(), id="no-library"),
        ],
    )
    def test_a_damaged_file_is_compiled_again(
        self, folder: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
    ) -> None:
        monkeypatch.setattr(library, "build", lambda *arguments: shutil.copy(compiled, arguments[-1]))
        found = find_compiler()
        folder.mkdir()
        names = [compiler.library_name(found, machine().kernel_isa, flags) for flags in (("-fopenmp",), ())]
        for name in names:
            (folder / name).write_bytes(content)
        assert library.load_cpu_kernels().functions is not None
        changed = [name for name in names if (folder / name).read_bytes() != content]
        assert len(changed) == 1 and compiler.is_whole(folder / changed[0])

    def test_a_changed_byte_is_noticed(self, compiled: Path, tmp_path: Path) -> None:
        assert compiler.is_whole(compiled)
        content = bytearray(compiled.read_bytes())
        content[3000] ^= 1
        (tmp_path / "changed.so").write_bytes(content)
        assert not compiler.is_whole(tmp_path / "changed.so")

    def test_without_a_folder_to_write_to(
        self, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(library, "build", lambda *arguments: shutil.copy(compiled, arguments[-1]))
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("JETFLOW_CACHE_DIR", str(tmp_path / "file"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert library.load_cpu_kernels().functions is not None
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_instruction_sets_and_flags_have_files_of_their_own(self) -> None:
        found = find_compiler()
        builds = [("avx512", ()), ("avx2", ()), ("avx2", ("-fopenmp",)), ("scalar", ())]
        assert len({compiler.library_name(found, isa, flags) for isa, flags in builds}) == len(builds)

    @pytest.mark.parametrize("isa", machine().isas)
    def test_each_instruction_set_that_is_here_is_served(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, isa: str
    ) -> None:
        monkeypatch.setenv("JETFLOW_CPU_ISA", isa)
        found = library.load_cpu_kernels()
        assert found.functions is not None and found.isa == isa and isa in found.detail

    def test_of_processes_that_start_at_once_one_compiles(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, program = tmp_path / "calls", tmp_path / "logging-cc"
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("cc") or shutil.which("gcc")} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("CC", str(program))
        commands = [subprocess.Popen([sys.executable, "-c", _ASK], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        answers = [command.communicate(timeout=120)[0] for command in commands]
        assert all(answer.startswith(f"True {machine().kernel_isa}, compiled by") for answer in answers), answers
        assert len(list(folder.iterdir())) == 1
        linked = [line for line in log.read_text().splitlines() if "-shared" in line]
        assert len(linked) == 1

    def test_threads_compile_once(self, folder: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def build(*arguments: Path) -> None:
            calls.append(arguments)
            time.sleep(0.2)
            shutil.copy(compiled, arguments[-1])

        monkeypatch.setattr(library, "build", build)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: cpu_kernels(), range(4)))
        assert len(calls) == 1 and all(each is found[0] for each in found)

    def test_no_second_openmp_is_loaded(self, folder: Path) -> None:
        def loaded() -> set[str]:
            lines = Path("/proc/self/maps").read_text().splitlines()
            return {line.split()[-1] for line in lines if "gomp" in line or "libomp" in line or "iomp" in line}

        before = loaded()
        assert library.load_cpu_kernels().functions is not None
        assert loaded() == before


def test_import_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETFLOW_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", "import jetflow_cluster.models.qwen3"], check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
