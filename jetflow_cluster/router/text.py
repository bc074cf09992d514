"""Text to token ids and back, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jetflow_cluster.models.tokenizer import read_tokenizer

#: Up to here encoding and decoding take less time than handing them to a thread and back would be worth.
_MAX_INLINE_CHARS = 2_048
_MAX_INLINE_TOKENS = 2_048
_NUM_THREADS = 2


class TextCodec:
    """A model's tokenizer.

    Args:
        path: its ``tokenizer.json``, or the directory that has it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no tokenizer.
    """

    def __init__(self, path: str | Path):
        folder = Path(path)
        found = read_tokenizer(folder if folder.is_dir() else folder.parent)
        if found is None:
            raise FileNotFoundError(f"tokenizer = {str(path)!r}: no tokenizer.json there")
        self._tokenizer = found
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="jetflow-tokenizer")

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, as the engine would have them."""
        if len(text) <= _MAX_INLINE_CHARS:
            return list(self._tokenizer.encode(text).ids)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode_long, text)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens and unknown ids have none."""
        if len(token_ids) <= _MAX_INLINE_TOKENS:
            return self._decode(token_ids)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, token_ids)

    def token_text(self, token_id: int) -> str:
        """The text of one token, also of a special one; U+FFFD where it is a part of a character."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def close(self) -> None:
        """Ends the threads; what they work on is finished first."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode_long(self, text: str) -> list[int]:
        # A batch is encoded without the interpreter's lock, unlike a single text.
        return list(self._tokenizer.encode_batch([text])[0].ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
