"""All replicas of a deployment compute alike, whatever nodes they are on, or say why they cannot."""

from __future__ import annotations

import asyncio
import os

import pytest
from ray import serve

from jetflow_cluster.cluster import directory
from jetflow_cluster.cluster.directory import Directory
from jetflow_kernels.machine import Arithmetic, machine
from support.served import APP, deploy_file, local_nodes, replicas, wait_until

WIDE = Arithmetic(dtype="float32", kernels="avx512", onednn="AVX512_CORE", aten="avx512")
NARROW = Arithmetic(dtype="float32", kernels="avx2", onednn="AVX2", aten="avx2")
#: A node whose processes take its processor for one without AVX-512.
AVX2_NODE = {"JETFLOW_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def test_the_first_replica_decides_until_none_of_its_deployment_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        found = Directory(forget_s=0.05)
        assert await found.agree("a", "one", WIDE) == WIDE
        assert await found.agree("b", "one", NARROW) == WIDE
        # A deployment with another configuration computes as it likes.
        assert await found.agree("c", "two", NARROW) == NARROW
        await found.leave("replica", "a")
        assert await found.agree("d", "one", NARROW) == WIDE
        for name in ("b", "d"):
            await found.leave("replica", name)
        assert await found.agree("e", "one", NARROW) == NARROW
        # One that never came up is forgotten, one that reports is not, and a new directory hears of it.
        monkeypatch.setattr(directory, "START_LIMIT_S", 0.0)
        assert await found.agree("f", "one", WIDE) == WIDE
        young = Directory()
        await young.report("replica", "f", "host:1", {"arithmetic": ("one", WIDE)})
        assert await young.agree("g", "one", NARROW) == WIDE

    asyncio.run(check())


@pytest.mark.parametrize(
    ("variables", "wanted", "is_able"),
    [
        ({}, NARROW, True),
        (AVX2_NODE, NARROW, True),
        (AVX2_NODE, WIDE, False),
        ({"ATEN_CPU_CAPABILITY": "default"}, NARROW, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, WIDE, False),
        ({}, Arithmetic(dtype="bfloat16", gpu="sm_90"), False),
    ],
)
@pytest.mark.skipif("avx512" not in machine().isas, reason="this processor has no AVX-512")
def test_only_what_is_wider_can_compute_as_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: Arithmetic, is_able: bool
) -> None:
    for name in AVX2_NODE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not is_able:
        with pytest.raises(ValueError, match=f"has no more than kernels .* it cannot compute in {wanted}"):
            wanted.apply()
        return
    monkeypatch.setattr("os.environ", dict(os.environ))
    wanted.apply()
    assert AVX2_NODE.items() <= os.environ.items()
    assert str(NARROW) == "float32, kernels avx2, oneDNN AVX2, torch avx2"


@pytest.mark.slow
@pytest.mark.skipif("avx512" not in machine().isas, reason="this processor has no AVX-512")
@pytest.mark.parametrize("first", ["narrow", "wide"])
def test_a_replica_on_another_kind_of_node(checkpoints: tuple[str, str], first: str) -> None:
    """The second replica, on a node of its own, follows a narrower first one, and cannot follow a wider one."""
    variables = [AVX2_NODE, {}] if first == "narrow" else [{}, AVX2_NODE]
    with local_nodes([1], [], head_variables=variables[0]) as nodes:
        deploy_file(checkpoints, 1, dtype="float32", page_size=8)
        wait_until(lambda: len(replicas()) == 1, 90)
        nodes.add_node(num_cpus=1, node_ip_address="127.0.0.2", env_vars=variables[1])
        deploy_file(checkpoints, 2, dtype="float32", page_size=8)

        def message() -> str:
            return str(serve.status().applications[APP].deployments["EngineReplica"].message)

        wait_until(lambda: len(replicas()) == 2 or "first replica" in message(), 120)
        if first == "narrow":
            assert {str(replica["arithmetic"][1]) for replica in replicas().values()} == {str(NARROW)}
        else:
            assert "has no more than kernels avx2, oneDNN AVX2, torch avx2" in message()
            assert f"the deployment's first replica computes in {WIDE}" in message()
            assert len(replicas()) == 1
