"""From tokens to text, step by step: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

#: What a decoder writes for bytes that are no whole character yet.
_PARTIAL = "\ufffd"
#: Tokens of the prompt that are decoded along, for decoders that treat the first token of a text differently.
_NUM_CONTEXT_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What some tokens made certain."""

    text: str
    #: Index, among the pushed tokens, of the one that completed a stop string.
    stop_index: int | None = None
    stop_string: str | None = None


class IncrementalDetokenizer:
    """The text of one request's output.

    Of several stop strings the one that is complete first ends the text; of those that one token completes, the one
    that starts first, then the longest.

    Args:
        tokenizer: decodes; special tokens are skipped.
        prompt_token_ids: what the output follows.
        stop: strings that end the output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        context = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
        if self._decode(context).endswith(_PARTIAL):
            context = []
        #: Tokens from the last place where all was whole characters, and how many of them were read.
        self._window, self._num_read = context, len(context)
        self._read_text = self._decode(context)
        #: Certain characters that may be the beginning of a stop string.
        self._held = ""

    def push(self, token_ids: Sequence[int], *, num_below_minimum: int = 0) -> Pushed:
        """Adds output tokens; behind a stop string nothing may be pushed.

        Args:
            token_ids: the next output tokens.
            num_below_minimum: how many of them, from the first, may not complete a stop string.
        """
        if not self._stop:
            return Pushed(text=self._read(token_ids))
        text = ""
        for index, token in enumerate(token_ids):
            self._held += self._read([token])
            if index < num_below_minimum:
                # What the minimum covers is no part of any stop string.
                text, self._held = text + self._held, ""
                continue
            found = [(at, -len(s), s) for s in self._stop if (at := self._held.find(s)) >= 0]
            if found:
                at, _, stop = min(found)
                return Pushed(text=text + self._held[:at], stop_index=index, stop_string=stop)
            keep = self._num_possible_start()
            cut = len(self._held) - keep
            text, self._held = text + self._held[:cut], self._held[cut:]
        return Pushed(text=text)

    def flush(self) -> str:
        """The text that was held back, at the end of the output."""
        rest = self._held + self._decode(self._window)[len(self._read_text) :]
        self._held, self._window, self._num_read, self._read_text = "", [], 0, ""
        return rest

    def _read(self, token_ids: Sequence[int]) -> str:
        """The whole characters that the tokens complete."""
        self._window = [*self._window, *token_ids]
        text = self._decode(self._window)
        if text.endswith(_PARTIAL) or len(text) < len(self._read_text):
            return ""
        new = text[len(self._read_text) :]
        if new:
            self._window = self._window[self._num_read :]
            self._num_read = len(self._window)
            self._read_text = self._decode(self._window)
        return new

    def _num_possible_start(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = max(len(s) for s in self._stop) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)) if token_ids else ""
