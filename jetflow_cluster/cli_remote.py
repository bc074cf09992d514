"""What ``jetflow generate`` needs of a server in place of an engine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jetflow_cluster.types import InvalidRequestError, RequestDelta, RequestOutput, SamplingParams

_DEFAULT_PORT = 9000


class RemoteLLM:
    """A server with the methods of `LLM` that the command line uses; a context manager.

    Args:
        servers: addresses divided by commas; port 9000 where none is named.
        model: name of the served model; None is whichever is served.
    """

    def __init__(self, servers: str, model: str | None):
        from jetflow_cluster.rpc.client import JetFlowClient

        addresses = [part.strip() for part in servers.split(",")]
        if not all(addresses):
            raise InvalidRequestError("server", servers, "must be host:port, or several divided by commas")
        self._client = JetFlowClient([_with_port(address) for address in addresses])
        self._model = model or ""

    def __enter__(self) -> RemoteLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def tokenizer(self) -> RemoteLLM:
        """What decodes."""
        return self

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._client.detokenize(token_ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the served model's chat template."""
        return self._client.tokenize(messages)

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[RequestOutput]:
        """Completes prompts, one after the other."""
        return [self._client.generate(prompt, params, model=self._model) for prompt in prompts]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[RequestDelta]:
        """Yields the deltas of one request; closing the iterator ends it on the server."""
        with self._client.stream(prompt, params, model=self._model) as deltas:
            yield from deltas


def connect(servers: str, model: str | None, engine_options: Mapping[str, Any]) -> RemoteLLM:
    """A server in place of an engine.

    Args:
        servers: addresses divided by commas.
        model: name of the served model; None is whichever is served.
        engine_options: what was given for an engine; only what says nothing can stand with a server.

    Raises:
        InvalidRequestError: an address is empty, or one of the options says something.
    """
    for name, value in engine_options.items():
        if value not in (None, "auto"):
            raise InvalidRequestError(name, value, "is the server's to choose; leave it out with --server")
    return RemoteLLM(servers, model)


def _with_port(address: str) -> str:
    return address if re.search(r":\d+$", address) else f"{address}:{_DEFAULT_PORT}"
