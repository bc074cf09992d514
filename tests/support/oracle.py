"""What the engine must reproduce: `transformers`, one token at a time, without cache, batching or trees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from jetflow_cluster.tree.noise import gumbel_noise
from jetflow_cluster.types import SamplingParams


class Oracle:
    """Token-by-token decoding by `transformers`, with the sampling rules written out slowly."""

    def __init__(self, folder: Path, dtype: torch.dtype, eos_ids: frozenset[int], max_len: int):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._eos_ids = eos_ids
        self._max_len = max_len
        self._logits: dict[tuple[int, ...], np.ndarray] = {}

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> np.ndarray:
        """The last position's logits, fp64 ``[vocab_size]``."""
        key = tuple(token_ids)
        if key not in self._logits:
            out = self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            self._logits[key] = out.double().numpy()
        return self._logits[key]

    @torch.inference_mode()
    def all_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """fp64 log-probabilities ``[n, vocab_size]`` of a whole sequence."""
        logits = self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits.double().log_softmax(-1)

    def complete(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
        """Output token ids and the finish reason; stop strings are left to the caller."""
        output = list(params.prior_output_token_ids)
        while True:
            token = self.choose(prompt, output, params)
            output.append(token)
            if token in self._eos_ids and not params.ignore_eos:
                return output, "stop"
            if token in params.stop_token_ids:
                return output, "stop"
            if len(output) >= params.max_tokens or len(prompt) + len(output) >= self._max_len:
                return output, "length"

    def choose(self, prompt: list[int], output: list[int], params: SamplingParams) -> int:
        """The token behind ``prompt + output``."""
        return int(self.scores(prompt, output, params).argmax())

    def gap(self, prompt: list[int], output: list[int], params: SamplingParams) -> float:
        """By how much the token behind ``prompt + output`` leads; infinite where it is the only one."""
        second, best = np.sort(self.scores(prompt, output, params))[-2:]
        return float(best - second)

    def scores(self, prompt: list[int], output: list[int], params: SamplingParams) -> np.ndarray:
        """What the token behind ``prompt + output`` is the largest of; noise included, fp64 ``[vocab_size]``."""
        scores = self.logits(prompt + output).copy()
        for token in set(prompt) | set(output):
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        for token in set(output):
            scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        if len(output) < params.min_tokens:
            suppressed = set(params.stop_token_ids) | (set() if params.ignore_eos else self._eos_ids)
            scores[sorted(suppressed)] = -math.inf
        if params.temperature == 0.0:
            return scores
        scores = _filtered(scores / params.temperature, params)
        position = torch.tensor(len(prompt) + len(output))
        assert params.seed is not None
        noise = gumbel_noise(params.seed, position, torch.arange(len(scores))).numpy()
        return scores + noise


def _filtered(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    keep = np.ones(len(scores), dtype=bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    if params.top_p < 1.0:
        left = np.where(keep, scores, -math.inf)
        probabilities = np.exp(left - left.max())
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities[order]) - probabilities[order]
        keep[order[before >= params.top_p]] = False
    if params.min_p > 0.0:
        keep &= scores >= scores.max() + math.log(params.min_p)
    return np.where(keep, scores, -math.inf)
