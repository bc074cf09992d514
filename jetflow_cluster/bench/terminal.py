"""Streams a request to a terminal, with the guessed tokens in colour."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from jetflow_cluster.types import FinishReason, RequestDelta, SamplingParams

#: Style of tokens that the draft head guessed.
GUESSED_STYLE = "green"


class StreamSource(Protocol):
    """An engine of one's own, or a server."""

    @property
    def tokenizer(self) -> Any:
        """What decodes; None if there is none."""

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[RequestDelta]:
        """The deltas of one request."""


@dataclass(kw_only=True)
class Streamed:
    """What a streamed request gave, counted from its deltas."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    #: Time inside the engine; printing is not counted.
    seconds: float = 0.0
    num_steps: int = 0
    #: Guessed tokens of each step.
    accepted_per_step: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, prompt processing included."""
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Mean tokens per target pass, the one over the prompt not counted."""
        decoding = self.accepted_per_step[1:]
        return 1 + sum(decoding) / len(decoding) if decoding else 1.0


def stream_to(
    console: Console, llm: StreamSource, prompt: str | Sequence[int], params: SamplingParams, *, coloured: bool
) -> Streamed:
    """Prints a request's text as it comes and returns what it was.

    Args:
        console: where to print.
        llm: what runs the request.
        prompt: text or token ids.
        params: how to sample and when to stop.
        coloured: show guessed tokens in colour.

    Raises:
        InvalidRequestError: the request cannot be honoured.
    """
    streamed = Streamed()
    for delta in _timed(llm.stream(prompt, params), streamed):
        streamed.token_ids += delta.token_ids
        streamed.text += delta.text
        streamed.finish_reason = delta.finish_reason
        if delta.token_ids:
            streamed.accepted_per_step.append(delta.num_accepted)
        if coloured:
            console.print(_styled(llm, delta), end="")
        else:
            # Rich drops control characters; plain output is the text to the last one.
            console.file.write(delta.text)
            console.file.flush()
    streamed.num_steps = len(streamed.accepted_per_step)
    return streamed


def _timed(deltas: Iterator[RequestDelta], streamed: Streamed) -> Iterator[RequestDelta]:
    while True:
        start = time.perf_counter()
        delta = next(deltas, None)
        streamed.seconds += time.perf_counter() - start
        if delta is None:
            return
        yield delta


def _styled(llm: StreamSource, delta: RequestDelta) -> Text:
    # Text that was held back makes the border between guessed and own tokens approximate; the text itself is exact.
    guessed = delta.token_ids[: delta.num_accepted]
    length = len(llm.tokenizer.decode(guessed)) if guessed and llm.tokenizer is not None else 0
    text = Text(delta.text)
    text.stylize(GUESSED_STYLE, 0, min(length, len(delta.text)))
    return text
