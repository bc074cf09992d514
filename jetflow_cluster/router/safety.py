"""Who may use a router's public ports, and how much. Off unless it is asked for, and then only on loopback."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from jetflow_cluster.router.callers import Limits


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Certificates, tokens and limits. Raises ValueError naming field, value and limit."""

    #: PEM file of the certificate chain for gRPC and HTTP; None serves without TLS.
    tls_cert_file: str | None = None
    #: PEM file of its key.
    tls_key_file: str | None = None
    #: PEM file of the authorities whose clients' certificates are let in (mutual TLS); None asks for none.
    tls_client_ca_file: str | None = None
    #: YAML file of the tokens that are let in; None lets anybody in. See `router.callers.TokenFile`.
    token_file: str | None = None
    #: Calls per second of each token; None is no limit.
    requests_per_s: float | None = None
    #: Prompt and output tokens per second of each token; None is no limit.
    tokens_per_s: float | None = None
    #: Calls of each token that may be under way at once; None is no limit.
    max_concurrent_requests: int | None = None
    #: Listen beyond loopback even without TLS and tokens.
    allow_insecure: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError(f"tls_key_file = {self.tls_key_file!r}: certificate and key must be given together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError(f"tls_client_ca_file = {self.tls_client_ca_file!r}: needs tls_cert_file")
        _ = self.limits

    @property
    def limits(self) -> Limits:
        """Of each token."""
        return Limits(
            requests_per_s=self.requests_per_s,
            tokens_per_s=self.tokens_per_s,
            max_concurrent=self.max_concurrent_requests,
        )

    def check_host(self, host: str) -> None:
        """Raises ValueError if it would be unsafe to listen there."""
        has_identity = self.token_file is not None or self.tls_client_ca_file is not None
        is_safe = self.tls_cert_file is not None and has_identity
        if not (is_loopback(host) or is_safe or self.allow_insecure):
            limit = "beyond loopback, TLS and tokens (or clients' certificates) must be given, or allow_insecure"
            raise ValueError(f"host = {host!r}: {limit}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
