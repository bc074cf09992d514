"""What is compiled ahead of time: every kernel in every configuration that is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfiguration:
    """One specialization of a Triton kernel, as a launch would ask for it."""

    #: Unique, with what distinguishes it: ``tree_attention-bf16-d128-split``.
    name: str
    #: The function under `triton.jit`.
    kernel: Any
    #: Type of each argument that is not a constant: ``*bf16``, ``*i32``, ``i64``, ``fp32``.
    types: Mapping[str, str]
    #: Value of each `tl.constexpr` argument.
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    #: Registers may spill: head sizes above 128.
    may_spill: bool = False
