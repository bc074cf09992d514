"""``jetflow generate --server`` prints what a local engine's would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from jetflow_cluster.cli import app
from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError
from jetflow_cluster.types import InvalidRequestError
from support.api_server import ApiServer, api_server, fail_after, refuse, toy_text, toy_tokens


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running


def generate(server: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", "abc", "--server", server, *arguments])


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_json_is_that_of_an_engine(server: ApiServer, chat: bool) -> None:
    arguments = ["--max-tokens", "6", "--seed", "5", "--logprobs", "0", "--json", *(["--chat"] if chat else [])]
    result = generate(server.address, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    # A conversation is encoded first, and asked as token ids.
    expected = toy_tokens(list(b"abc") if chat else "abc", 5, 6)
    assert found["token_ids"] == expected
    assert found["text"] == toy_text(expected)
    assert found["prompt_token_ids"] == list(b"abc")
    assert found["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "cached_tokens": 2}
    assert found["speculation"] == {
        "num_steps": 1,
        "num_draft_nodes": 3,
        "num_accepted_tokens": 0,
        "accepted_per_step": [],
        "mean_acceptance_length": 1.0,
    }
    assert len(found["logprobs"]) == 6


def test_text_streams_and_survives_a_break(server: ApiServer) -> None:
    server.servicer.faults = [fail_after(3, StatusError.unavailable("gone"))]
    result = generate(server.address, "--max-tokens", "12")
    assert result.exit_code == 0, result.output
    assert result.stdout == toy_text(toy_tokens("abc", 1234, 12)) + "\n"
    assert len(server.servicer.requests) == 2


def test_stats_count_the_steps(server: ApiServer) -> None:
    result = generate(server.address, "--max-tokens", "6", "--stats")
    assert result.exit_code == 0, result.output
    assert result.stdout == toy_text(toy_tokens("abc", 1234, 6)) + "\n"
    assert "6 tokens in 3 passes" in result.stderr
    assert "ended by length" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(["--draft-head", "x"], "draft_head = 'x': is the server's", id="draft-head"),
        pytest.param(["--dtype", "float64"], "dtype = 'float64': is the server's", id="dtype"),
        pytest.param(["--device", "cpu"], "device = 'cpu': is the server's", id="device"),
        pytest.param(["--max-model-len", "64"], "max_model_len = 64: is the server's", id="max-model-len"),
        pytest.param(["--model", "x" * 300], "model = 'xxx", id="model"),
    ],
)
def test_what_a_server_chooses_cannot_be_given(server: ApiServer, arguments: list[str], message: str) -> None:
    result = generate(server.address, *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


@pytest.mark.parametrize(
    "error, exit_code, message",
    [
        pytest.param(StatusError.not_found("no model"), 1, "NOT_FOUND: no model", id="not-found"),
        pytest.param(RuntimeError("secret"), 1, "INTERNAL: internal error", id="internal"),
        pytest.param(
            InvalidFieldsError([InvalidRequestError("a", 1, "no"), InvalidRequestError("b", 2, "no")]),
            2,
            "a = 1: no; b = 2: no",
            id="invalid",
        ),
    ],
)
def test_errors_of_the_server_are_one_line(server: ApiServer, error: Exception, exit_code: int, message: str) -> None:
    server.servicer.faults = [refuse(error)]
    result = generate(server.address)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert "secret" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("address", ["", "a:1,,b:2"])
def test_addresses_are_checked(address: str) -> None:
    result = generate(address)
    assert result.exit_code == 2
    assert "server = " in result.stderr
