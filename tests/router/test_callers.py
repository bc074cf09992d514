"""Tokens, their allowances, and the gate that holds callers to them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetflow_cluster.router.callers import Limits, TokenFile
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.gate import Gate, charge
from jetflow_cluster.router.safety import SafetyConfig, is_loopback
from jetflow_cluster.router.token_bucket import BURST_S, Bucket
from jetflow_cluster.rpc.errors import StatusError

ALICE, BOB = "alice-has-this-token", "bob-has-another-token"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_tokens_have_names_and_limits(tmp_path: Path) -> None:
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    file = write(
        tmp_path / "tokens.yaml",
        f"- {{name: alice, token: {ALICE}}}\n- {{name: bob, sha256: {digest}, tokens_per_s: 5, max_concurrent: 1}}\n",
    )
    tokens = TokenFile(file, Limits(requests_per_s=2))
    alice, bob = tokens.caller(f"Bearer {ALICE}"), tokens.caller(f"bearer  {BOB}")
    assert alice is not None and (alice.name, alice.limits) == ("alice", Limits(requests_per_s=2))
    assert bob is not None and bob.limits == Limits(requests_per_s=2, tokens_per_s=5, max_concurrent=1)
    for wrong in (None, "", ALICE, f"Basic {ALICE}", "Bearer ", f"Bearer {ALICE}x", f"Bearer {digest}"):
        assert tokens.caller(wrong) is None


def test_a_changed_file_counts_and_a_faulty_one_does_not(tmp_path: Path) -> None:
    clock = Clock()
    file = write(tmp_path / "tokens.yaml", f"- {{name: alice, token: {ALICE}}}\n")
    tokens = TokenFile(file, Limits(), clock)
    write(file, f"- {{name: bob, token: {BOB}}}\n- {{name: carol, token: {ALICE}}}\n")
    clock.now += 2
    found = tokens.caller(f"Bearer {ALICE}")
    assert found is not None and found.name == "carol"
    for text in ("- {name: x", "[]", "- {name: dave, token: short}"):
        write(file, text)
        clock.now += 2
        assert tokens.caller(f"Bearer {BOB}") is not None
    file.unlink()
    clock.now += 2
    assert tokens.caller(f"Bearer {BOB}") is not None


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{}", "must be a list"),
        ("- {token: abcdefghijklmnopq}", "name is missing"),
        ("- {name: a}", "either a token or a sha256"),
        ("- {name: a, token: abc}", "at least 16"),
        ("- {name: a, sha256: abc}", "64 hexadecimal digits"),
        ("- {name: a, token: abcdefghijklmnopq, rate: 3}", "unknown fields rate"),
        ("- {name: a, token: abcdefghijklmnopq, requests_per_s: 0}", "requests_per_s = 0"),
        ("- {name: a, token: abcdefghijklmnopq}\n- {name: a, token: abcdefghijklmnopz}", "nobody else's"),
        ("- {name: a, token: abcdefghijklmnopq}\n- {name: b, token: abcdefghijklmnopq}", "nobody else's"),
    ],
)
def test_faults_of_the_file_are_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TokenFile(write(tmp_path / "tokens.yaml", text), Limits())


@given(st.floats(0.01, 1000), st.lists(st.tuples(st.floats(0, 5), st.floats(0, 100)), max_size=40))
def test_no_more_than_the_rate_and_the_burst_is_used(rate: float, steps: list[tuple[float, float]]) -> None:
    now, used = 0.0, 0.0
    bucket = Bucket.full(rate, now)
    for pause_s, amount in steps:
        now += pause_s
        if bucket.wait_s(amount, now) == 0:
            bucket = bucket.less(amount, now)
            used += amount
        else:
            later = now + bucket.wait_s(amount, now)
            assert bucket.wait_s(amount, later + 1e-6) == pytest.approx(0, abs=1e-6)
    most = max(1.0, rate * BURST_S)
    # One use above the most is let in when the bucket is full, and made up for.
    assert used <= most + rate * now + max([0.0, *(amount for _, amount in steps)]) + 1e-6


def code(gate: Gate, authorization: str | None = None) -> StatusError | None:
    try:
        with gate.enter(authorization):
            return None
    except StatusError as error:
        return error


def test_the_gate_holds_callers_to_their_limits(tmp_path: Path) -> None:
    clock = Clock()
    file = write(
        tmp_path / "tokens.yaml",
        f"- {{name: alice, token: {ALICE}, requests_per_s: 0.2}}\n"
        f"- {{name: bob, token: {BOB}, max_concurrent: 1, tokens_per_s: 10}}\n",
    )
    gate = Gate(TokenFile(file, Limits(), clock), Limits(), clock)
    refused = code(gate, "Bearer nobody-has-this-token")
    assert refused is not None and refused.code is grpc.StatusCode.UNAUTHENTICATED
    assert [code(gate, f"Bearer {ALICE}") for _ in range(2)] == [None, None]
    refused = code(gate, f"Bearer {ALICE}")
    assert refused is not None and refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.retry_after_s == pytest.approx(5, abs=0.01)
    with gate.enter(f"Bearer {BOB}"):
        charge()(150)
        refused = code(gate, f"Bearer {BOB}")
        assert refused is not None and "under way" in refused.message
    refused = code(gate, f"Bearer {BOB}")
    assert refused is not None and refused.retry_after_s == pytest.approx(5.1, abs=0.01)
    clock.now += 6
    assert code(gate, f"Bearer {BOB}") is None
    assert code(gate, f"Bearer {ALICE}") is None


@pytest.mark.parametrize(
    "host, options, is_allowed",
    [
        ("127.0.0.1", {}, True),
        ("127.0.0.7", {}, True),
        ("::1", {}, True),
        ("localhost", {}, True),
        ("0.0.0.0", {}, False),
        ("10.0.0.1", {"token_file": "t"}, False),
        ("10.0.0.1", {"tls_cert_file": "c", "tls_key_file": "k"}, False),
        ("10.0.0.1", {"tls_cert_file": "c", "tls_key_file": "k", "token_file": "t"}, True),
        ("10.0.0.1", {"tls_cert_file": "c", "tls_key_file": "k", "tls_client_ca_file": "a"}, True),
        ("example.org", {"allow_insecure": True}, True),
    ],
)
def test_beyond_loopback_something_must_guard(host: str, options: dict[str, object], is_allowed: bool) -> None:
    if is_allowed:
        RouterConfig(host=host, safety=SafetyConfig(**options))  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match="allow_insecure"):
            RouterConfig(host=host, safety=SafetyConfig(**options))  # type: ignore[arg-type]
    assert is_loopback(host) == (host in ("127.0.0.1", "127.0.0.7", "::1", "localhost"))
