"""Certificates of an authority of their own, and a file of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKEN = "a-token-of-some-length"


class Files:
    """What a guarded router and its clients read."""

    def __init__(self, folder: Path):
        import trustme

        self.folder, self.authority = folder, trustme.CA()
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        self.tokens = folder / "tokens.yaml"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.renew()
        self.tokens.write_text(f"- {{name: one, token: {TOKEN}}}\n")

    def renew(self) -> None:
        """Another certificate for the server."""
        made = self.authority.issue_cert("localhost", "127.0.0.1")
        made.private_key_pem.write_to_path(str(self.key))
        made.cert_chain_pems[0].write_to_path(str(self.cert))
        self.pem = made.cert_chain_pems[0].bytes()

    def client(self) -> tuple[bytes, bytes]:
        """Key and chain of a client."""
        made = self.authority.issue_cert("client@example.org")
        return made.private_key_pem.bytes(), made.cert_chain_pems[0].bytes()

    def safety(self, *, is_mutual: bool = False) -> dict[str, Any]:
        """Fields of `SafetyConfig`: TLS and tokens."""
        fields = {"tls_cert_file": self.cert, "tls_key_file": self.key, "token_file": self.tokens}
        if is_mutual:
            fields["tls_client_ca_file"] = self.ca
        return {name: str(path) for name, path in fields.items()}
