"""The systems under measurement: this engine with and without speculation, and `transformers`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from jetflow_cluster.bench.rows import Run
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.types import SamplingParams, SpeculationOptions


class System(Protocol):
    """Completes a batch of prompts greedily with exactly `max_tokens` tokens each, end-of-text or not."""

    name: str

    def run(self, prompts: Sequence[list[int]], max_tokens: int) -> Run:
        """One timed run."""


class EngineSystem:
    """This engine under one setting of speculation."""

    def __init__(self, name: str, llm: LLM, speculation: SpeculationOptions):
        self.name = name
        self._llm = llm
        self._speculation = speculation

    def run(self, prompts: Sequence[list[int]], max_tokens: int) -> Run:
        """One timed run; all prompts arrive at once."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, speculation=self._speculation)
        start = _now()
        outputs = self._llm.generate(list(prompts), params)
        seconds = _now() - start
        num_steps = sum(output.speculation.num_steps for output in outputs)
        num_accepted = sum(output.speculation.num_accepted_tokens for output in outputs)
        return Run(
            seconds=seconds,
            token_ids=[output.token_ids for output in outputs],
            mean_acceptance_length=1 + num_accepted / max(1, num_steps),
        )


class TransformersSystem:
    """`transformers` greedy generation, plain or with prompt lookup, on the same weights."""

    def __init__(self, name: str, model: Any, *, num_lookup_tokens: int | None = None):
        self.name = name
        self._model = model
        self._num_lookup_tokens = num_lookup_tokens

    def run(self, prompts: Sequence[list[int]], max_tokens: int) -> Run:
        """One timed run; prompts of unequal length are padded at the left."""
        from transformers import GenerationConfig

        longest = max(len(prompt) for prompt in prompts)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._model.device
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            eos_token_id=None,
            prompt_lookup_num_tokens=self._num_lookup_tokens,
        )
        passes = _PassCounter(self._model)
        with torch.inference_mode(), passes:
            start = _now()
            output = self._model.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
            seconds = _now() - start
        return Run(
            seconds=seconds,
            token_ids=output[:, longest:].tolist(),
            mean_acceptance_length=(max_tokens - 1) / max(1, passes.count - 1),
        )


class _PassCounter:
    """Counts a model's forward passes while it is entered."""

    def __init__(self, model: Any):
        self.count = 0
        self._model = model

    def __enter__(self) -> _PassCounter:
        self._handle = self._model.register_forward_pre_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _add(self, *_: object) -> None:
        self.count += 1


def load_transformers(target_dir: Path, dtype: str, device: torch.device) -> Any:
    """The target as `transformers` runs it, without an end-of-text token.

    Args:
        target_dir: a checkpoint folder.
        dtype: a torch dtype's name.
        device: where it runs.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(str(target_dir), dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
