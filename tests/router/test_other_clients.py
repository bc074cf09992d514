"""Clients that know nothing of this project: by reflection, a health probe, the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.router.server import SERVICE
from jetflow_cluster.rpc.oip import open_inference_pb2 as oip
from jetflow_cluster.rpc.oip import open_inference_pb2_grpc
from support.router_stack import stack
from support.toy_cluster import cluster, failure, run

PROMPT = "for i in range(3):"

# Another process: its messages have the names of ours.
TRITON = """
import json, sys
import numpy
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
model, prompt = sys.argv[2:4]
ready = client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
given = triton.InferInput("text_input", [1], "BYTES")
given.set_data_from_numpy(numpy.array([prompt.encode()], dtype=object))
parameters = {"max_tokens": 20, "seed": 3, "temperature": 0.5, "ignore_eos": True}
answer = client.infer(model, [given], parameters=parameters)
print(json.dumps({
    "ready": ready,
    "server": client.get_server_metadata().name,
    "inputs": [each.name for each in client.get_model_metadata(model).inputs],
    "text": answer.as_numpy("text_output")[0].decode(),
    "ids": answer.as_numpy("output_ids").tolist(),
    "reason": answer.as_numpy("finish_reason")[0].decode(),
}))
"""


def test_a_client_of_the_open_inference_protocol(
    local: LLM, frontends: list[EngineFrontend], target: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tritonclient")
    params = SamplingParams(max_tokens=20, seed=3, temperature=0.5, ignore_eos=True)
    wanted = local.generate([PROMPT], params)[0]

    async def test() -> None:
        async with stack(frontends, target) as made:
            command = [sys.executable, "-c", TRITON, f"127.0.0.1:{made.router.port}", target.name, PROMPT]
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env
            )
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            assert (found["text"], found["ids"], found["reason"]) == (wanted.text, wanted.token_ids, "length")
            assert found["ready"] and found["server"] == "jetflow-cluster"
            assert found["inputs"] == ["text_input", "input_ids"]

    run(test, 240)


INPUT = oip.ModelInferRequest.InferInputTensor
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"inputs": []}, "inputs"),
    "name": ({"inputs": [INPUT(name="images", datatype="FP32")]}, "images"),
    "type": ({"inputs": [INPUT(name="text_input", datatype="FP32")]}, "text_input"),
    "two": ({"inputs": [INPUT(name="text_input", datatype="BYTES", contents={"bytes_contents": [b"a", b"b"]})]}, "one"),
    "utf-8": ({"inputs": [INPUT(name="text_input", datatype="BYTES", contents={"bytes_contents": [b"\xff"]})]}, "UTF"),
    "raw": ({"raw_input_contents": [b"\x01"]}, "lengths"),
    "parameter": ({"parameters": {"beams": {"int64_param": 3}}}, "beams"),
    "stream": ({"parameters": {"stream": {"bool_param": True}}}, "parameters"),
    "value": ({"parameters": {"temperature": {"double_param": -1}}}, "temperature"),
    "output": ({"outputs": [{"name": "logits"}]}, "logits"),
}


@pytest.mark.parametrize("changes, named", BAD.values(), ids=BAD)
def test_what_cannot_be_inferred_is_named(changes: dict[str, Any], named: str) -> None:
    given = INPUT(name="text_input", datatype="BYTES", shape=[1], contents={"bytes_contents": [b"hello"]})

    async def test() -> None:
        async with cluster(1) as made:
            stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(made.routers[0].channel)
            message = oip.ModelInferRequest(**({"model_name": "toy", "inputs": [given]} | changes))
            error: Any = None
            try:
                await stub.ModelInfer(message)
            except grpc.aio.AioRpcError as raised:
                error = raised
            assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert named in error.details()

    run(test)


def test_models_that_are_not_served() -> None:
    async def test() -> None:
        async with cluster(1) as made:
            stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(made.routers[0].channel)
            assert not (await stub.ModelReady(oip.ModelReadyRequest(name="other"))).ready
            assert (await stub.ModelReady(oip.ModelReadyRequest(name="toy"))).ready
            error = await failure(stub.ModelMetadata(oip.ModelMetadataRequest(name="other")))
            assert error.code is grpc.StatusCode.NOT_FOUND
            ids = INPUT(name="input_ids", datatype="INT32", shape=[3], contents={"int_contents": [3, 1, 4]})
            answer = await stub.ModelInfer(
                oip.ModelInferRequest(model_name="toy", inputs=[ids], outputs=[{"name": "output_ids"}])
            )
            assert [output.name for output in answer.outputs] == ["output_ids"]
            assert list(answer.outputs[0].shape) == [16]

    run(test)


REFLECTION = """
import json, sys
from grpc_requests import Client
from grpc_health.v1 import health_pb2
import grpc
from grpc_health.v1 import health_pb2_grpc

address, service, prompt = sys.argv[1:4]
with grpc.insecure_channel(address) as channel:
    question = health_pb2.HealthCheckRequest(service=service)
    status = health_pb2_grpc.HealthStub(channel).Check(question).status
client = Client.get_by_endpoint(address)
sampling = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
request = {"text": prompt, "sampling": sampling}
once = client.request(service, "GenerateOnce", request)
events = list(client.request(service, "GenerateStream", request))
print(json.dumps({"status": status, "services": list(client.service_names), "once": once["text"],
    "stream": "".join(event["delta"].get("text", "") for event in events if "delta" in event)}))
"""


def test_a_client_by_reflection(local: LLM, frontends: list[EngineFrontend], target: Path, tmp_path: Path) -> None:
    pytest.importorskip("grpc_requests")
    wanted = local.generate([PROMPT], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))[0]

    async def test() -> None:
        async with stack(frontends, target) as made:
            command = [sys.executable, "-c", REFLECTION, f"127.0.0.1:{made.router.port}", SERVICE, PROMPT]
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env
            )
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            assert found["status"] == 1
            assert {SERVICE, "inference.GRPCInferenceService"} <= set(found["services"])
            assert found["once"] == found["stream"] == wanted.text

    run(test, 240)
