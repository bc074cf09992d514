"""What ``jetflow generate`` needs of a server in place of an engine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jetflow_cluster.env import read_environment
from jetflow_cluster.types import InvalidRequestError, RequestDelta, RequestOutput, SamplingParams

_DEFAULT_PORT = 9000


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a server is spoken to. Raises InvalidRequestError for a part of a pair."""

    #: Shown with every call.
    token: str | None = field(default=None, repr=False)
    #: PEM file of the authorities that the server's certificate is checked by; TLS is spoken where it is given.
    ca_cert: Path | None = None
    #: PEM files of the client's own chain and key, for mutual TLS.
    client_cert: Path | None = None
    client_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            given = self.client_cert or self.client_key
            raise InvalidRequestError("client_cert", str(given), "certificate and key must be given together")
        if self.client_cert is not None and self.ca_cert is None:
            raise InvalidRequestError("client_cert", str(self.client_cert), "needs ca_cert")

    def check_used(self, server: str | None) -> None:
        """Raises InvalidRequestError if something is given and there is no server to show it to."""
        for name in ("token", "ca_cert", "client_cert"):
            if server is None and getattr(self, name) is not None:
                raise InvalidRequestError(name, "given", "is for a server: needs --server")


class RemoteLLM:
    """A server with the methods of `LLM` that the command line uses; a context manager.

    Args:
        servers: addresses divided by commas; port 9000 where none is named.
        model: name of the served model; None is whichever is served.
        access: how the server is spoken to.
    """

    def __init__(self, servers: str, model: str | None, access: Access):
        from jetflow_cluster.rpc.client import JetFlowClient, tls_credentials

        addresses = [part.strip() for part in servers.split(",")]
        if not all(addresses):
            raise InvalidRequestError("server", servers, "must be host:port, or several divided by commas")
        credentials = None
        if access.ca_cert is not None:
            credentials = tls_credentials(access.ca_cert, access.client_cert, access.client_key)
        named = [_with_port(address) for address in addresses]
        self._client = JetFlowClient(named, credentials=credentials, token=access.token)
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


def connect(servers: str, model: str | None, engine_options: Mapping[str, Any], access: Access) -> RemoteLLM:
    """A server in place of an engine.

    Args:
        servers: addresses divided by commas.
        model: name of the served model; None is whichever is served.
        engine_options: what was given for an engine; only what says nothing can stand with a server.
        access: how the server is spoken to; without a token, that of the environment is shown.

    Raises:
        InvalidRequestError: an address is empty, or one of the options says something.
    """
    for name, value in engine_options.items():
        if value not in (None, "auto"):
            raise InvalidRequestError(name, value, "is the server's to choose; leave it out with --server")
    if access.token is None:
        access = replace(access, token=read_environment().token)
    return RemoteLLM(servers, model, access)


def _with_port(address: str) -> str:
    return address if re.search(r":\d+$", address) else f"{address}:{_DEFAULT_PORT}"
