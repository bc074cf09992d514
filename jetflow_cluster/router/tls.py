"""Certificates of the public ports, which may be renewed while they are used."""

from __future__ import annotations

import logging
import os
import ssl
import time
from pathlib import Path

import grpc

_log = logging.getLogger(__name__)
_LOOK_S = 1.0


class ServerCertificate:
    """A certificate with its key, and for mutual TLS the authorities whose clients are let in.

    Files that change are read again within a second; connections that are open stay. Files that do not fit each other
    change nothing, and the log says so.

    Args:
        cert_file: the chain, in PEM.
        key_file: its key, in PEM, without a password.
        client_ca_file: authorities of clients' certificates, in PEM; None asks clients for none.

    Raises:
        OSError: a file cannot be read, or key and certificate do not fit; names field and file.
    """

    def __init__(self, cert_file: str, key_file: str, client_ca_file: str | None = None):
        self._files = (cert_file, key_file, client_ca_file)
        #: Of an HTTP server.
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        for field, name in zip(("tls_cert_file", "tls_key_file", "tls_client_ca_file"), self._files, strict=True):
            if name is not None:
                _check_readable(field, name)
        self._stamps = self._look()
        self._load()
        self._next_look = time.monotonic() + _LOOK_S

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Of a gRPC server; new connections get what the files hold then."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._renewed, require_client_authentication=self._files[2] is not None
        )

    def refresh(self) -> bool:
        """Reads what changed; True when something did, and fits."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_S
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return False
            self._load()
            self._stamps = stamps
        except (OSError, ValueError) as error:
            _log.error("the certificate stays as it was: %s", error)
            return False
        _log.info("%s was read again", self._files[0])
        return True

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC, in a thread of its own, at each new connection."""
        try:
            stamps = self._look()
            if stamps == self._grpc_stamps:
                return None
            # Only a pair that fits is handed on.
            _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._files[0], self._files[1])
            return self._configuration()
        except (OSError, ValueError) as error:
            _log.error("the certificate stays as it was: %s", error)
            return None

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        self._grpc_stamps = self._look()
        cert, key, authorities = (None if name is None else Path(name).read_bytes() for name in self._files)
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=authorities)

    def _look(self) -> tuple[tuple[int, int], ...]:
        found = [os.stat(name) for name in self._files if name is not None]
        return tuple((status.st_mtime_ns, status.st_size) for status in found)

    def _load(self) -> None:
        cert, key, authorities = self._files
        # A pair that does not fit is noticed before it replaces one that does.
        _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
        _load_pair(self.context, cert, key)
        if authorities is not None:
            try:
                self.context.load_verify_locations(authorities)
            except ssl.SSLError:
                raise OSError(f"tls_client_ca_file = {authorities!r}: holds no certificates in PEM") from None
            self.context.verify_mode = ssl.CERT_REQUIRED


def _check_readable(field: str, name: str) -> None:
    try:
        Path(name).read_bytes()
    except OSError as error:
        raise OSError(f"{field} = {name!r}: {error.strerror}") from None


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Raises OSError with field, file and what is wrong with it."""

    def refuse_password() -> str:
        # Without this the library asks for it at the terminal.
        raise OSError(f"tls_key_file = {key!r}: has a password; give a key without one")

    try:
        context.load_cert_chain(cert, key, refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise OSError(f"tls_key_file = {key!r}: does not fit tls_cert_file = {cert!r}") from None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cert)
        except ssl.SSLError:
            raise OSError(f"tls_cert_file = {cert!r}: holds no certificate in PEM") from None
        raise OSError(f"tls_key_file = {key!r}: holds no key in PEM") from None
