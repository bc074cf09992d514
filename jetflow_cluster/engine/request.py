"""State of one request while it is in the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.engine.detokenizer import IncrementalDetokenizer
from jetflow_cluster.engine.worth import Worth
from jetflow_cluster.layers.sampler import TokenCounts
from jetflow_cluster.tree.lookup import ContextGuess, ContextIndex
from jetflow_cluster.types import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    SpeculationMode,
    SpeculationStats,
    TokenLogprobs,
    Usage,
)


class RequestStatus(enum.Enum):
    """Where a request is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(kw_only=True)
class Appended:
    """What `Request.append` kept of the tokens that it was given."""

    token_ids: list[int]
    text: str


@dataclass(kw_only=True, eq=False)
class Request:
    """One request. Invariant while decoding: ``num_computed == len(token_ids) - 1``; the last token is the
    anchor, committed and not yet in the KV cache."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    #: Order of arrival; admission and preemption follow it.
    arrival: int
    pages: PageTable
    keys: PageKeys
    detokenizer: IncrementalDetokenizer | None
    eos_token_ids: frozenset[int]
    #: Longest prompt plus output that this engine allows.
    max_len: int
    #: Prompt and output so far.
    token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    #: Tokens whose target KV is in the pages (the target's context length).
    num_computed: int = 0
    #: First token of the draft context, at the beginning of a page: above 0 where earlier ones were passed without
    #: keeping their hidden vectors.
    draft_start: int = 0
    #: End of the draft context that is in the pages; the next tokens wait in `pending_fused`.
    draft_len: int = 0
    #: End of the tokens whose fused vectors are known: `draft_len` and what waits.
    fused_len: int = 0
    #: Fused hidden vectors ``[n, hidden_size]`` of the tokens from `draft_len` on, in order.
    pending_fused: list[torch.Tensor] = field(default_factory=list)
    #: Where the request's own text repeats itself, once it was asked.
    context_index: ContextIndex | None = None
    #: What the request's own text guessed in the present step, where its trees are told.
    context_guess: ContextGuess | None = None
    #: What its guesses were worth so far.
    worth: Worth = field(default_factory=Worth)
    #: Steps for which its own text is not looked at for repetitions, because there was none.
    lookup_pause: int = 0
    #: Full pages that the prefix cache was told of.
    num_cached_pages: int = 0
    #: Those of them whose draft context is complete, as far as the prefix cache was told.
    num_draft_valid_pages: int = 0
    #: Times that the request gave its pages back and started again.
    num_preemptions: int = 0
    token_counts: TokenCounts | None = None
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.usage.prompt_tokens = len(self.prompt_token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def has_ended(self) -> bool:
        """True once it has a finish reason, whether its pages are free already or not."""
        return self.finish_reason is not None

    @property
    def num_output(self) -> int:
        """Output tokens so far, prior ones included."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_remaining_rows(self) -> int:
        """Committed tokens that the target has not computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def wants_speculation(self) -> bool:
        """False when the request switched speculation off."""
        return self.params.speculation.mode is not SpeculationMode.OFF

    @property
    def has_draft_context(self) -> bool:
        """True when the draft context, with what waits, reaches up to the anchor."""
        return self.draft_start < self.fused_len == self.num_computed

    @property
    def num_unkept(self) -> int:
        """How many of the next committed tokens `keep_context` would leave out, however many they are."""
        if self.fused_len < self.num_computed:
            return -self.num_computed % self.pages.page_size
        return self.fused_len - self.num_computed

    def keep_context(self, num_rows: int) -> int:
        """Counts the next `num_rows` committed tokens, from `num_computed` on, as ones whose fused vectors are known.

        Behind tokens whose vectors nobody kept the draft context begins anew, with the next page: pages that others may
        read are not written to, and attention needs no mask for what is missing.

        Returns:
            How many of them, the first ones, are before that and must be left out.
        """
        if self.fused_len < self.num_computed:
            page_size = self.pages.page_size
            page = -(-self.num_computed // page_size)
            self.draft_start = self.draft_len = self.fused_len = page * page_size
            self.num_draft_valid_pages = page
            self.pending_fused.clear()
        num_left_out = min(num_rows, self.fused_len - self.num_computed)
        self.fused_len += num_rows - num_left_out
        return num_left_out

    def lose_draft_context(self) -> None:
        """Its pages hold no draft context any more; it begins anew. What only waits to be absorbed is kept."""
        if self.draft_len > self.draft_start:
            # No token is known, so the next ones to be kept come behind a gap.
            self.draft_start = self.draft_len = self.fused_len = self.num_draft_valid_pages = 0
            self.pending_fused.clear()

    def counted_tokens(self) -> TokenCounts:
        """How often each token occurs so far."""
        if self.token_counts is None:
            self.token_counts = TokenCounts(self.prompt_token_ids, self.token_ids[len(self.prompt_token_ids) :])
        return self.token_counts

    @property
    def room(self) -> int:
        """Tokens that the request may still emit."""
        return min(self.params.max_tokens - self.num_output, self.max_len - len(self.token_ids))

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens that may not be chosen anywhere below `min_tokens`."""
        eos = () if self.params.ignore_eos else tuple(sorted(self.eos_token_ids))
        return eos + tuple(self.params.stop_token_ids)

    def append(self, token_ids: list[int]) -> Appended:
        """Commits tokens up to the first stop, sets the finish reason there, and returns what was kept."""
        num_before = self.num_output
        kept: list[int] = []
        for token in token_ids:
            kept.append(token)
            if token in self.eos_token_ids and not self.params.ignore_eos:
                self.finish_reason = FinishReason.STOP
            elif token in self.params.stop_token_ids:
                self.finish_reason, self.matched_stop = FinishReason.STOP, token
            elif len(kept) >= self.room:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason:
                break
        text = ""
        if self.detokenizer is not None:
            below_minimum = max(0, self.params.min_tokens - num_before)
            pushed = self.detokenizer.push(kept, num_below_minimum=below_minimum)
            text = pushed.text
            if pushed.stop_index is not None:
                kept = kept[: pushed.stop_index + 1]
                self.finish_reason, self.matched_stop = FinishReason.STOP, pushed.stop_string
            elif self.finish_reason:
                text += self.detokenizer.flush()
        self.token_ids += kept
        self.usage.completion_tokens = self.num_output
        self.text += text
        if self.token_counts is not None:
            self.token_counts.extend(kept)
        return Appended(token_ids=kept, text=text)

    def finish(self, reason: FinishReason) -> str:
        """Ends the request from outside; returns the text that was held back."""
        text = self.detokenizer.flush() if self.detokenizer is not None else ""
        self.text += text
        self.finish_reason = reason
        return text

    def output(self) -> RequestOutput:
        """What the request produced so far."""
        first = len(self.prompt_token_ids)
        wants_logprobs, wants_prompt = self.params.logprobs is not None, self.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=list(self.prompt_token_ids),
            token_ids=self.token_ids[first:],
            text=self.text,
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            prompt_logprobs=list(self.prompt_logprobs) if wants_prompt else None,
            seed=self.seed,
            usage=self.usage,
            speculation=self.speculation,
        )
