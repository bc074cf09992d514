"""What goes in and out of an engine: parameters, outputs, statistics, errors. Imports no torch."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 32
MAX_SEED = 2**64 - 1


class InvalidRequestError(ValueError):
    """A request that cannot be honoured.

    Attributes:
        field: name of the offending field, such as ``sampling.temperature``.
        value: what was given.
        limit: what is allowed, in words.
    """

    def __init__(self, field: str, value: object, limit: str):
        super().__init__(f"{field} = {value!r}: {limit}")
        self.field, self.value, self.limit = field, value, limit


class SpeculationMode(enum.StrEnum):
    """How one request speculates."""

    AUTO = "auto"
    OFF = "off"
    FORCE = "force"


class LatencyClass(enum.StrEnum):
    """What a request's tokens are worth beside those of others."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"


class FinishReason(enum.StrEnum):
    """Why a request ended. ``stop`` is an end-of-text or stop token, or a stop string."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """Per-request limits of tree speculation."""

    #: ``auto`` follows the measured budget, ``off`` decodes token by token, ``force`` always speculates.
    mode: SpeculationMode | str = SpeculationMode.AUTO
    #: Most nodes of one tree, root included; None is the engine's choice.
    max_tree_nodes: int | None = None
    #: Most tokens guessed along one path; None is no limit.
    max_depth: int | None = None
    #: In mode ``auto``: a guess for an ``interactive`` request counts twice when it is weighed against what it costs,
    #: so that the request gets more of the step and finishes earlier; one for a ``batch`` request counts half, so that
    #: it speculates only where that is cheap.
    latency_class: LatencyClass | str = LatencyClass.NORMAL
    #: Tell in each delta what the step guessed and what was kept of it, as `RequestDelta.tree`; for streams only.
    include_trees: bool = False

    def __post_init__(self) -> None:
        if self.mode not in tuple(SpeculationMode):
            raise InvalidRequestError("speculation.mode", self.mode, "must be one of auto, off, force")
        object.__setattr__(self, "mode", SpeculationMode(self.mode))
        if self.latency_class not in tuple(LatencyClass):
            limit = "must be one of interactive, normal, batch"
            raise InvalidRequestError("speculation.latency_class", self.latency_class, limit)
        object.__setattr__(self, "latency_class", LatencyClass(self.latency_class))
        _check_int("speculation.max_tree_nodes", self.max_tree_nodes, 1, 512, optional=True)
        _check_int("speculation.max_depth", self.max_depth, 1, 64, optional=True)
        if not isinstance(self.include_trees, bool):
            raise InvalidRequestError("speculation.include_trees", self.include_trees, "must be True or False")

    def refuse_trees(self) -> None:
        """Raises InvalidRequestError if trees are asked for where nobody is told of single steps."""
        if self.include_trees:
            raise InvalidRequestError("speculation.include_trees", True, "only a stream tells trees")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Greedy at ``temperature=0``."""

    #: Divisor of the logits; 0 is greedy.
    temperature: float = 1.0
    #: Keep the k most probable tokens; 0 keeps all.
    top_k: int = 0
    #: Keep the smallest set of tokens whose mass reaches this.
    top_p: float = 1.0
    #: Drop tokens less probable than this share of the best one.
    min_p: float = 0.0
    #: Key of the position-keyed noise; None lets the engine draw one.
    seed: int | None = None
    #: Most tokens of output, those in `prior_output_token_ids` included.
    max_tokens: int = 16
    #: No end-of-text, stop token or stop string counts before this many output tokens.
    min_tokens: int = 0
    #: Texts that end the output; they are not part of it.
    stop: tuple[str, ...] | list[str] | str = ()
    #: Token ids that end the output; they are part of it.
    stop_token_ids: tuple[int, ...] | list[int] = ()
    #: Go on behind the model's end-of-text token.
    ignore_eos: bool = False
    #: Divides positive and multiplies negative logits of tokens seen in prompt or output.
    repetition_penalty: float = 1.0
    #: Subtracted once from the logit of every token seen in the output.
    presence_penalty: float = 0.0
    #: Subtracted from a token's logit for each time it is in the output.
    frequency_penalty: float = 0.0
    #: Added to the logits of these token ids.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    #: None for none; n gives the chosen token's and the n best log-probabilities per output token.
    logprobs: int | None = None
    #: The same for each prompt token but the first.
    prompt_logprobs: int | None = None
    #: Tokens that an earlier, interrupted run of this request already produced; they count as output.
    prior_output_token_ids: tuple[int, ...] | list[int] = ()
    #: Limits of tree speculation.
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "prior_output_token_ids", tuple(self.prior_output_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        _check_float("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < 1e-3:
            raise InvalidRequestError("temperature", self.temperature, "must be 0 (greedy) or at least 0.001")
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, 0, MAX_SEED, optional=True)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_stops(tuple(self.stop), tuple(self.stop_token_ids))
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias key", token, 0, 2**31 - 1)
            _check_float(f"logit_bias[{token}]", bias, -100.0, 100.0)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        prior = self.prior_output_token_ids
        # Prior output may be long, so it is looked at one by one only where something is wrong.
        if prior and (set(map(type, prior)) != {int} or min(prior) < 0 or max(prior) >= 2**31):
            for token in prior:
                _check_int("prior_output_token_ids", token, 0, 2**31 - 1)
        if len(prior) > self.max_tokens:
            raise InvalidRequestError("prior_output_token_ids", f"{len(prior)} tokens", "must be at most max_tokens")

    @property
    def is_greedy(self) -> bool:
        """True when no noise is drawn."""
        return self.temperature == 0.0


def _check_stops(stop: tuple[str, ...], stop_token_ids: tuple[int, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS}")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError("stop", text, "must be non-empty strings")
    for token in stop_token_ids:
        _check_int("stop_token_ids", token, 0, 2**31 - 1)


def _check_int(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(name, value, f"must be an integer in [{low}, {high}]")


def _check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high or (low_open and value == low):  # type: ignore[operator]
        raise InvalidRequestError(name, value, f"must be a number in {'(' if low_open else '['}{low}, {high}]")


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the target's distribution before penalties and filters."""

    token_id: int
    logprob: float
    #: The n best tokens and their log-probabilities, best first.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Prompt tokens whose KV came from the prefix cache.
    cached_tokens: int = 0


@dataclass(kw_only=True)
class SpeculationStats:
    """What speculation did for one request. A step is one verify pass that emitted tokens."""

    num_steps: int = 0
    #: Guessed nodes that were verified, roots not counted.
    num_draft_nodes: int = 0
    num_accepted_tokens: int = 0
    #: ``accepted_per_step[k]``: steps that accepted k guessed tokens.
    accepted_per_step: list[int] = field(default_factory=list)

    def record(self, num_draft_nodes: int, num_accepted: int) -> None:
        """Counts one step."""
        self.num_steps += 1
        self.num_draft_nodes += num_draft_nodes
        self.num_accepted_tokens += num_accepted
        self.accepted_per_step += [0] * (num_accepted + 1 - len(self.accepted_per_step))
        self.accepted_per_step[num_accepted] += 1

    @property
    def mean_acceptance_length(self) -> float:
        """Mean tokens emitted per step, the bonus token counted; 0 before the first step."""
        return 1.0 + self.num_accepted_tokens / self.num_steps if self.num_steps else 0.0


class GuessSource(enum.StrEnum):
    """Where a node of a tree came from."""

    #: It is the root, a token that the request has already.
    ANCHOR = "anchor"
    HEAD = "head"
    #: The request's own text: what followed an earlier place like its end.
    CONTEXT = "context"
    HEAD_AND_CONTEXT = "head_and_context"


@dataclass(frozen=True, kw_only=True)
class StepTree:
    """What one step guessed for one request, and what of it was kept. Node 0 is the root: the last token before the
    step's own. The first four lists have an entry per node."""

    token_ids: list[int]
    #: Parent of each node, ``parents[i] < i``; -1 for the root.
    parents: list[int]
    #: Natural logarithm of the probability, by the drafter's account, that the target writes all of the path from the
    #: root to the node; 0 for the root.
    path_logprobs: list[float]
    sources: list[GuessSource]
    #: Nodes that the target confirmed, root first; each but the root gave a token of the step.
    accepted_nodes: list[int]


@dataclass(kw_only=True)
class RequestDelta:
    """What one step added to one request."""

    request_id: str
    #: Index of the first of `token_ids` in the request's output.
    offset: int
    token_ids: list[int]
    #: Text that became certain: whole characters, and never a part of a stop string.
    text: str
    logprobs: list[TokenLogprobs] | None = None
    #: How many of `token_ids` were guessed by the draft head (the first ones); the rest came from the target alone.
    num_accepted: int = 0
    #: What the step guessed, where `SpeculationOptions.include_trees` asks for it; None for a step that computed
    #: several tokens of the prompt, and a root alone for one without guesses.
    tree: StepTree | None = None
    finish_reason: FinishReason | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A finished, or so far produced, request."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    #: The stop string or token id that ended the output.
    matched_stop: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    seed: int = 0
    usage: Usage = field(default_factory=Usage)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters of an engine at one moment; ``num_free_pages + num_used_pages + num_cached_pages == num_pages``."""

    num_pages: int
    num_free_pages: int
    num_used_pages: int
    num_cached_pages: int
    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_finished: int
    num_generated_tokens: int
    #: Kernels compiled since the engine was ready; each one delayed a step.
    num_late_compilations: int = 0
    #: Guessed nodes that were verified, roots not counted.
    num_verified_nodes: int = 0
    #: Guesses that were right, by depth; the first entry is depth 1.
    accepted_by_depth: tuple[int, ...] = ()
    #: Steps with at least one guessed node.
    num_drafted_steps: int = 0
    #: Steps in which some request might have speculated, and none did.
    num_skipped_steps: int = 0
    #: Steps in which draft workers guessed for one half of the requests while the other was verified.
    num_overlapped_steps: int = 0
    #: Tokens per second that a node must be expected to add for each second that it costs; 0 without a price.
    speculation_price: float = 0.0
    #: Why there is speculation, or none: ``given`` (by configuration), ``pays``, ``load``, ``head`` (its guesses are
    #: worth too little), ``context`` (draft contexts are being rebuilt), ``idle``.
    speculation_reason: str = "given"
