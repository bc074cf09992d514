"""From tokens to text, step by step: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

#: What a decoder writes for bytes that are no whole character (yet).
_PARTIAL = "\ufffd"
#: Most of them, at the end of a text, that later tokens can turn into something else: a character has at most four
#: bytes, and some decoders write one for each byte.
_MAX_PENDING = 3
#: Tokens of the prompt that are decoded along, for decoders that treat the first token of a text differently.
_NUM_CONTEXT_TOKENS = 4
#: Tokens in a row that may fail to end with a whole character before the oldest of them are let go, and how many stay
#: then: enough for the pending bytes and a whole character before them.
_MAX_WINDOW, _KEPT_WINDOW = 32, 16


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What some tokens made certain."""

    text: str
    #: Index, among the pushed tokens, of the one that completed a stop string.
    stop_index: int | None = None
    stop_string: str | None = None


class IncrementalDetokenizer:
    """The text of one request's output; it does not depend on how the tokens are cut into pushes.

    The text is what the tokenizer decodes the whole output to, in the place behind the prompt. (A decoder with byte
    fallback takes back a character when an invalid byte follows at once; here a character that was told stays.)

    Of several stop strings the one whose last character comes first ends the text; of those that end there, the
    longest. A token costs the same at any length of the output.

    Args:
        tokenizer: decodes; special tokens and ids that it does not know have no text.
        prompt_token_ids: what the output follows.
        stop: non-empty strings that end the output; the text ends before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._stop = [_StopString(text) for text in stop]
        context = [token for token in prompt_token_ids[-_NUM_CONTEXT_TOKENS:] if self._has_text(token)]
        text = self._decode(context)
        if text.endswith(_PARTIAL):
            # Half a character of the prompt is no beginning of the output.
            context, text = [], ""
        #: The last tokens, and the part of their text that was read: all of it but what is pending.
        self._window, self._read_text = context, text
        #: Tokens of the window at the last place where nothing was pending.
        self._num_whole = len(context)
        #: Characters that were read and may be the beginning of a stop string.
        self._held = ""

    def push(self, token_ids: Sequence[int], *, num_below_minimum: int = 0) -> Pushed:
        """Adds output tokens; behind a stop string nothing may be pushed.

        Args:
            token_ids: the next output tokens.
            num_below_minimum: how many of them, from the first, may not complete a stop string. One that begins in
                their text and is completed behind it counts.
        """
        if not self._stop:
            return Pushed(text="".join(map(self._read, token_ids)))
        text = ""
        for index, token in enumerate(token_ids):
            new = self._read(token)
            found = self._find_stop(new, counts=index >= num_below_minimum)
            if found is not None:
                end, stop = found
                text += (self._held + new[:end])[: -len(stop)]
                self._reset()
                return Pushed(text=text, stop_index=index, stop_string=stop)
            self._held += new
            cut = len(self._held) - max(stop.num_matched for stop in self._stop)
            text, self._held = text + self._held[:cut], self._held[cut:]
        return Pushed(text=text)

    def flush(self) -> str:
        """The text that was held back, at the end of the output; empty behind a stop string."""
        rest = self._held + self._decode(self._window)[len(self._read_text) :]
        self._reset()
        return rest

    def _reset(self) -> None:
        self._held, self._window, self._read_text, self._num_whole = "", [], "", 0

    def _read(self, token: int) -> str:
        """The characters that the token makes certain."""
        if not self._has_text(token):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.startswith(self._read_text):
            # The decoder takes back what was read: the tokens behind it go on alone.
            del self._window[: self._num_whole or -1]
            self._read_text, self._num_whole = "", 0
            text = self._decode(self._window)
        certain = max(len(text) - _num_pending(text), len(self._read_text))
        new = text[len(self._read_text) : certain]
        if certain == len(text):
            del self._window[: self._num_whole]
            self._num_whole = len(self._window)
            self._read_text = self._decode(self._window)
        elif len(self._window) > _MAX_WINDOW:
            del self._window[:-_KEPT_WINDOW]
            self._num_whole = 0
            text = self._decode(self._window)
            self._read_text = text[: len(text) - _num_pending(text)]
        else:
            self._read_text = text[:certain]
        return new

    def _find_stop(self, new: str, *, counts: bool) -> tuple[int, str] | None:
        """The first stop string that new characters complete, and how many of them it takes."""
        for end, character in enumerate(new, start=1):
            found = [stop.text for stop in self._stop if stop.completes(character)]
            if found and counts:
                return end, max(found, key=len)
        return None

    def _has_text(self, token: int) -> bool:
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)) if token_ids else ""


class _StopString:
    """Finds a string in a stream of characters at constant cost for each (Knuth, Morris, Pratt)."""

    def __init__(self, text: str):
        self.text = text
        #: Length of the longest beginning of `text`, short of all of it, that the stream ends with.
        self.num_matched = 0
        #: Of each beginning of `text`, by its last index: the longest shorter one that it ends with.
        self._borders = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._borders[length - 1]
            length += text[i] == text[length]
            self._borders[i] = length

    def completes(self, character: str) -> bool:
        """Takes the next character; True when the stream now ends with the string."""
        length = self.num_matched
        while length and character != self.text[length]:
            length = self._borders[length - 1]
        length += character == self.text[length]
        is_complete = length == len(self.text)
        self.num_matched = self._borders[-1] if is_complete else length
        return is_complete


def _num_pending(text: str) -> int:
    """Characters at the end of a decoded text that later tokens may change."""
    return min(_MAX_PENDING, len(text) - len(text.rstrip(_PARTIAL)))
