"""Configuration of an engine."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
#: Tree size of a request that forces speculation and names no size, root included.
DEFAULT_MAX_TREE_NODES = 32
#: Candidates considered per depth.
MAX_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that decides how an engine runs. Raises ValueError naming field, value and limit."""

    #: Target checkpoint: a directory or a Hugging Face id; None is the embedded default.
    model: str | None = None
    #: Draft head checkpoint; None takes the embedded one for the embedded target, else no speculation.
    draft_head: str | None = None
    #: Compute type of weights and KV cache; ``auto`` is the checkpoint's on a GPU, float32 on a CPU. A half type that a
    #: CPU does not compute in, or not row by row, is what weights are rounded to before they are computed with in
    #: float32.
    dtype: str = "auto"
    #: Compute type of the draft head; ``auto`` is the target's, or bf16 on a CPU that computes in it. Any type is
    #: lossless.
    draft_dtype: str = "auto"
    #: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    device: str = "auto"
    #: Shards of the target. An in-process engine runs one; the served cluster runs more.
    tensor_parallel_size: int = 1
    #: KV slots per page.
    page_size: int = 16
    #: Pages of the KV cache; None is a plan from free memory and the largest possible batch.
    num_pages: int | None = None
    #: Most rows of one step: prompt tokens, single tokens and tree nodes together (`verify_budget`).
    max_num_batched_tokens: int = 2048
    #: Most prompt tokens of one request in a step; None is what the step has room for.
    max_prompt_chunk: int | None = None
    #: Most requests that run at once.
    max_num_requests: int = 64
    #: Longest prompt plus output; None is the model's own limit.
    max_model_len: int | None = None
    #: Reuse KV pages of equal prompt prefixes.
    enable_prefix_cache: bool = True
    #: Mix what a greedy request's own text suggests into its trees.
    context_lookup: bool = True
    #: On CUDA, replay steps without prompt chunks from CUDA graphs; their trees hold no lookups.
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.draft_dtype not in DTYPES:
            raise ValueError(f"draft_dtype = {self.draft_dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise ValueError(f"device = {self.device!r}: must be auto, cpu, cuda or cuda:N")
        for name in ("tensor_parallel_size", "page_size", "max_num_batched_tokens", "max_num_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("num_pages", "max_model_len", "max_prompt_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.max_num_batched_tokens < self.max_num_requests:
            raise ValueError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens}: must be at least "
                f"max_num_requests = {self.max_num_requests}, one row for each"
            )
