"""``jetflow generate --server`` before a router that wants TLS, tokens and clients' certificates."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jetflow_cluster.cli import app
from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.server import ReplicaServer
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.safety import SafetyConfig
from jetflow_cluster.router.server import RouterServer
from jetflow_cluster.rpc.client import tls_credentials
from support.toy_cluster import PATIENT, run, until

pytest.importorskip("trustme")
from support.certificates import TOKEN, Files


def generate(port: int, *arguments: str, token: str | None = None) -> Any:
    command = ["generate", "x = ", "--server", f"localhost:{port}", "--max-tokens", "5", "--ignore-eos", *arguments]
    return CliRunner(env={"JETFLOW_TOKEN": token}).invoke(app, command)


@pytest.mark.parametrize("is_mutual", [False, True], ids=["tls", "mutual"])
def test_tokens_and_certificates(
    frontends: list[EngineFrontend], target: Path, tmp_path: Path, is_mutual: bool
) -> None:
    files = Files(tmp_path)
    key, chain = files.client()
    for name, data in (("own.key", key), ("own.pem", chain)):
        (tmp_path / name).write_bytes(data)
    own = ["--client-cert", str(tmp_path / "own.pem"), "--client-key", str(tmp_path / "own.key")] if is_mutual else []
    trusting = ["--ca-cert", str(files.ca), *own]

    async def test() -> None:
        safety = SafetyConfig(**files.safety(is_mutual=is_mutual))
        router = RouterServer(RouterConfig(host="127.0.0.1", port=0, tokenizer=str(target), safety=safety, **PATIENT))
        replica = ReplicaServer(ReplicaServerConfig(replica_id="replica-0", host="127.0.0.1"), frontends[0])
        port = await router.start()
        router.set_replicas({"replica-0": f"127.0.0.1:{await replica.start()}"})
        try:
            await until(lambda: router.is_serving)
            for arguments, token in ((["--token", TOKEN], None), ([], TOKEN), (["--token", TOKEN], "another")):
                result = await asyncio.to_thread(generate, port, *trusting, *arguments, token=token)
                assert result.exit_code == 0, result.output
            result = await asyncio.to_thread(generate, port, *trusting, token="another")
            assert result.exit_code == 1 and "UNAUTHENTICATED" in result.stderr
            assert TOKEN not in result.output and "another" not in result.output
        finally:
            await router.stop()
            await replica.stop()

    run(test, 120)


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(["--token", "abc"], "token = 'given': is for a server", id="token"),
        pytest.param(["--ca-cert", "x.pem"], "ca_cert = 'given': is for a server", id="ca"),
        pytest.param(["--server", "x", "--client-key", "k"], "must be given together", id="key"),
        pytest.param(["--server", "x", "--client-cert", "c", "--client-key", "k"], "needs ca_cert", id="no-ca"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "x", *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert "abc" not in result.output


def test_a_file_that_is_not_there_is_named() -> None:
    result = generate(1, "--ca-cert", "none.pem")
    assert result.exit_code == 1 and "none.pem" in result.stderr
    with pytest.raises(ValueError, match="must be given together"):
        tls_credentials(cert_file="x.pem")
