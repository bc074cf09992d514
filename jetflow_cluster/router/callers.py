"""Who may call: tokens with names, from a file that may change while it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_log = logging.getLogger(__name__)
#: Seconds between looks at the file.
_LOOK_S = 1.0
_MIN_TOKEN_CHARS = 16
_SCHEME = "bearer "


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller may use. None is no limit. Raises ValueError naming field, value and limit."""

    #: Calls per second in the long run, and at most ten seconds' worth of them at once.
    requests_per_s: float | None = None
    #: Prompt and output tokens per second in the long run, and at most ten seconds' worth of them at once.
    tokens_per_s: float | None = None
    #: Calls that may be under way at once.
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{field.name} = {value!r}: must be a number above 0, or None")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls, and what they may use."""

    name: str
    limits: Limits = Limits()


class TokenFile:
    """The tokens of a YAML file, which is read again within a second of a change.

    The file is a list; each entry has a ``name``, a ``token`` (or the ``sha256`` of one, in hexadecimal digits) and, if
    they differ from the router's, fields of `Limits`. A file that cannot be read, or has a fault, changes nothing: the
    tokens before it stay, and the log says why.

    Args:
        path: of the file.
        limits: of those whose entry has none.
        clock: seconds.

    Raises:
        ValueError: the file has a fault.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._path, self._limits, self._clock = Path(path), limits, clock
        try:
            self._stamp = self._look()
            self._callers = self._read()
        except OSError as error:
            raise OSError(f"token_file = {str(path)!r}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"token_file = {error}") from None
        self._next_look = clock() + _LOOK_S

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose token an ``Authorization: Bearer`` header holds; None when it is nobody's.

        Takes as long for every token of the file, whether and where one of them fits.
        """
        self._refresh()
        is_bearer = authorization is not None and authorization[: len(_SCHEME)].lower() == _SCHEME
        token = authorization[len(_SCHEME) :].strip() if authorization is not None and is_bearer else ""
        digest, found = _digest(token), None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._callers = self._read()
                _log.info("%s: %d tokens", self._path, len(self._callers))
        except (OSError, ValueError) as error:
            _log.error("the tokens stay as they were: %s", error)

    def _look(self) -> tuple[int, int, int]:
        found = os.stat(self._path)
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> dict[bytes, Caller]:
        try:
            entries = yaml.safe_load(self._path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ValueError(f"{self._path}: is no YAML") from None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self._path}: must be a list of at least one token")
        found: dict[bytes, Caller] = {}
        names = set()
        for index, entry in enumerate(entries):
            try:
                digest, caller = _entry(entry, self._limits)
            except ValueError as error:
                raise ValueError(f"{self._path}: entry {index}: {error}") from None
            if digest in found or caller.name in names:
                raise ValueError(f"{self._path}: entry {index}: name and token must be nobody else's")
            names.add(caller.name)
            found[digest] = caller
        return found


def _entry(entry: Any, limits: Limits) -> tuple[bytes, Caller]:
    if not isinstance(entry, Mapping):
        raise ValueError("must have a name and a token")
    fields = dict(entry)
    name, token, digest = (fields.pop(key, None) for key in ("name", "token", "sha256"))
    if not isinstance(name, str) or not name:
        raise ValueError("name is missing")
    known = {field.name for field in dataclasses.fields(Limits)}
    if unknown := fields.keys() - known:
        raise ValueError(f"unknown fields {', '.join(sorted(map(str, unknown)))}; known are {', '.join(sorted(known))}")
    caller = Caller(name=name, limits=dataclasses.replace(limits, **fields))
    if isinstance(token, str) and digest is None:
        if len(token) < _MIN_TOKEN_CHARS:
            raise ValueError(f"the token has {len(token)} characters: must be at least {_MIN_TOKEN_CHARS}")
        return _digest(token), caller
    if isinstance(digest, str) and token is None:
        try:
            raw = bytes.fromhex(digest)
        except ValueError:
            raw = b""
        if len(raw) == hashlib.sha256().digest_size:
            return raw, caller
        raise ValueError("sha256 must be 64 hexadecimal digits")
    raise ValueError("must have either a token or a sha256")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
