"""The compiled CPU kernels of every instruction set: the same bits wherever products are fused with sums, and wherever
they are not; on this machine, and by QEMU on what `make processors` needs."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from jetflow_kernels.cpu import cpu_kernels
from jetflow_kernels.machine import machine
from support.processor_calls import make_calls
from support.processors import Build, Processor, build_all, missing_packages
from support.recorded_calls import Call, num_other, output, read_answers, write_calls

pytestmark = pytest.mark.skipif(cpu_kernels().functions is None, reason="no compiled CPU kernels")

NEHALEM, HASWELL, CORE2 = (("qemu-x86_64", "-cpu", name) for name in ("Nehalem", "Haswell", "core2duo"))
NATIVE = [Processor(isa=isa) for isa in machine().isas]
EMULATED = [
    Processor(isa="sse42", emulator=NEHALEM),
    Processor(isa="scalar", emulator=NEHALEM),
    # QEMU 7.2 reads 16 bytes for the 4 of a scalar vfmadd.
    Processor(isa="avx2", emulator=HASWELL, spare_bytes=16),
    Processor(isa="neon", emulator=("qemu-aarch64",)),
]
PROCESSORS = [
    *(pytest.param(processor, id=str(processor)) for processor in NATIVE),
    *(pytest.param(processor, id=str(processor), marks=pytest.mark.processors) for processor in EMULATED),
]
Answers = Callable[[Processor], list[Call]]

#: Instruction sets that the machine's own compiler builds for, whether or not its processor has them.
OWN_ISAS = ["neon", "scalar"] if machine().architecture == "aarch64" else ["avx512", "avx2", "sse42", "scalar"]
#: Where time is spent, in sums of products.
HOT = [
    *("norm_row", "silu_row", "heads_row", "weigh", "marginal_row", "scored_row"),
    *("attend_4x64", "attend_2x128", "attend_1x64", "attend_1x128", "attend_any"),
]
_SSE4 = r"^(blendv|pblend|insertps|pextr[bdq]|pinsr[bdq]|pmovzx|pmulld|p(min|max)s[bd]|round[ps]|popcnt)"
#: Of each instruction set: what every hot function has, what some function has, and what none may have.
INSTRUCTIONS = {
    "avx512": (r"^vfn?madd\w+ps\s.*%zmm", r"%zmm", r"%tmm"),
    "avx2": (r"^vfn?madd\w+ps\s.*%ymm", r"%ymm", r"%zmm|\{%k|%[xy]mm(1[6-9]|2\d|3[01])"),
    "sse42": (r"^mulps\s", _SSE4, r"%[yz]mm|^v"),
    "scalar": (r"^mulps\s", r"^mulps\s", rf"%[yz]mm|^v|{_SSE4}"),
    "neon": (r"^fmla\s+v\d+\.4s", r"^fmla\s+v\d+\.4s", r"^ptrue|\bz\d+\.s"),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    return build_all(OWN_ISAS, tmp_path_factory.mktemp("builds"))


@pytest.fixture(scope="module")
def neon_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Build]:
    """Made when it is asked for."""
    return cache(lambda: build_all(["neon"], tmp_path_factory.mktemp("neon"))["neon"])


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return make_calls()


@pytest.fixture(scope="module")
def answers(
    builds: dict[str, Build],
    neon_build: Callable[[], Build],
    calls: list[Call],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """What a processor answers, computed once."""
    folder = tmp_path_factory.mktemp("answers")
    write_calls(calls, folder / "calls")

    @cache
    def answers_of(processor: Processor) -> list[Call]:
        if processor.emulator:
            _needs_emulators()
        build = builds[processor.isa] if processor.isa in builds else neon_build()
        done = build.make_calls(processor, folder / "calls", folder / "answers")
        assert done.returncode == 0, done.stderr
        return read_answers(calls, folder / "answers")

    return answers_of


def _needs_emulators() -> None:
    if machine().architecture != "x86_64":
        pytest.skip("the builds for x86-64 are made on x86-64")
    if sentence := missing_packages():
        pytest.fail(sentence, pytrace=False)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_bits_are_those_of_others(processor: Processor, calls: list[Call], answers: Answers) -> None:
    """Those of this machine's library where it rounds as this processor does, else of the first that does."""
    expected = calls
    if processor.is_fused != Processor(isa=cpu_kernels().isa).is_fused:
        expected = answers(next(p for p in (*NATIVE, *EMULATED) if p.is_fused == processor.is_fused))
    for i, (found, wanted) in enumerate(zip(answers(processor), expected, strict=True)):
        assert found.returned == wanted.returned, (i, found.function)
        for k in range(len(found.answers)):
            one, other = output(found, k), output(wanted, k)
            if processor.emulator and found.function == "draft_candidates" and k > 0:
                # Log-probabilities and scores: exp and log are of the other machine's C library.
                torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1, equal_nan=True)
            else:
                assert num_other(one, other) == 0, (i, found.function, k)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_answers_are_those_of_plain_torch(processor: Processor, answers: Answers) -> None:
    for i, call in enumerate(answers(processor)):
        for k, (wanted, rtol, atol) in call.wanted.items():
            found = output(call, k).to(wanted.dtype).view(wanted.shape)
            torch.testing.assert_close(
                found,
                wanted,
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda text, at=(i, call.function, k): f"{at}: {text}",
            )


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_row_is_the_same_in_every_batch(processor: Processor, answers: Answers) -> None:
    made = answers(processor)
    num_parts = 0
    for i, call in enumerate(made):
        for part in call.parts:
            own, of = (
                output(*each).view(torch.uint8)[place].view(call.dtypes[part.output])
                for each, place in (((call, part.output), part.own), ((made[part.whole], part.output), part.of))
            )
            assert own.numel() == of.numel() and num_other(own, of) == 0, (i, call.function, part)
            num_parts += 1
    assert num_parts > len(made) // 2


@pytest.mark.parametrize("isa", [*OWN_ISAS, pytest.param("neon", marks=pytest.mark.processors)])
def test_instructions(isa: str, builds: dict[str, Build], neon_build: Callable[[], Build]) -> None:
    if isa not in builds:
        _needs_emulators()
    found = (builds[isa] if isa in builds else neon_build()).instructions(isa)
    hot, some, never = map(re.compile, INSTRUCTIONS[isa])
    without = [name for name in HOT if not any(hot.search(line) for line in found[name])]
    assert not without, f"no {hot.pattern}"
    assert any(some.search(line) for body in found.values() for line in body)
    assert [(name, line) for name, body in found.items() for line in body if never.search(line)] == []


@pytest.mark.processors
@pytest.mark.parametrize(
    "isa, emulator",
    [("avx512", HASWELL), ("avx512", NEHALEM), ("avx2", NEHALEM), ("sse42", CORE2)],
    ids=["avx512-on-avx2", "avx512-on-sse42", "avx2-on-sse42", "sse42-on-ssse3"],
)
def test_what_a_processor_lacks_ends_the_program(
    isa: str, emulator: tuple[str, ...], builds: dict[str, Build], calls: list[Call], tmp_path: Path
) -> None:
    """So a build that used more than its instruction set would not pass above."""
    _needs_emulators()
    write_calls(calls, tmp_path / "calls")
    processor = Processor(isa=isa, emulator=emulator, spare_bytes=16)
    done = builds[isa].make_calls(processor, tmp_path / "calls", tmp_path / "answers")
    assert done.returncode == -signal.SIGILL
