"""The Open Inference Protocol, version 2: one completion per `ModelInfer`, by the same path as every other request."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from jetflow_cluster.router.servicer import InferenceServicer
from jetflow_cluster.router.version import installed_version
from jetflow_cluster.router.web.openai_answers import REASONS
from jetflow_cluster.router.web.openai_requests import read_request
from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError
from jetflow_cluster.rpc.oip import open_inference_pb2 as oip
from jetflow_cluster.rpc.oip import open_inference_pb2_grpc
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import InvalidRequestError

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_TEXT, _IDS = "text_input", "input_ids"
#: Datatypes of the token ids that are taken: the format of raw contents, and the field of the others.
_INTEGERS = {
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
}
_OUTPUTS = (("text_output", "BYTES"), ("output_ids", "INT64"), ("finish_reason", "BYTES"))


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService`. Parameters of a request are the fields of a completion over HTTP.

    Args:
        servicer: answers.
        is_serving: whether requests can be served now.
    """

    def __init__(self, servicer: InferenceServicer, is_serving: Callable[[], bool]):
        self._servicer, self._is_serving = servicer, is_serving

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Any) -> oip.ServerLiveResponse:
        """True: the process answers."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Any) -> oip.ServerReadyResponse:
        """Whether requests can be served now."""
        return oip.ServerReadyResponse(ready=self._is_serving())

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Any) -> oip.ModelReadyResponse:
        """Whether requests for this model can be served now."""
        if not self._is_serving():
            return oip.ModelReadyResponse(ready=False)
        try:
            card = await self._servicer.card(request.name)
        except StatusError:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=request.version in ("", card.version))

    async def ServerMetadata(self, request: oip.ServerMetadataRequest, context: Any) -> oip.ServerMetadataResponse:
        """Name and version of the server."""
        return oip.ServerMetadataResponse(name="jetflow-cluster", version=installed_version())

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Any) -> oip.ModelMetadataResponse:
        """Names and types of what goes in and comes out."""
        card = await self._card(request.name, request.version)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=card.model,
            versions=[card.version],
            platform="jetflow",
            inputs=[
                tensor(name=_TEXT, datatype="BYTES", shape=[1]),
                tensor(name=_IDS, datatype="INT64", shape=[-1]),
            ],
            outputs=[
                tensor(name=name, datatype=kind, shape=[-1 if name == "output_ids" else 1]) for name, kind in _OUTPUTS
            ],
        )

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:
        """One completion."""
        card = await self._card(request.model_name, request.model_version)
        wanted = [output.name for output in request.outputs] or [name for name, _ in _OUTPUTS]
        if unknown := set(wanted) - {name for name, _ in _OUTPUTS}:
            raise InvalidRequestError("outputs", sorted(unknown), f"must be of {', '.join(n for n, _ in _OUTPUTS)}")
        body = {name: _value(parameter) for name, parameter in request.parameters.items()}
        if clash := body.keys() & {"prompt", "model", "stream", "request_id", "logprobs"}:
            raise InvalidRequestError("parameters", sorted(clash), "must be other fields of a completion")
        body |= {"prompt": _prompt(request), "model": card.model}
        if request.id:
            body["request_id"] = request.id
        message = read_request("completion", body).message
        result = await self._servicer.GenerateOnce(message, context)
        return _response(request, card, result, wanted)

    async def _card(self, name: str, version: str) -> pb.ModelCard:
        card = await self._servicer.card(name)
        if version not in ("", card.version):
            raise StatusError.not_found("this version of the model is not served here")
        return card


def _value(parameter: oip.InferParameter) -> Any:
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)


def _prompt(request: oip.ModelInferRequest) -> str | list[int]:
    """The text or token ids of the one input; raw contents, where there are any, are those of the inputs in order."""
    if len(request.inputs) != 1 or len(request.raw_input_contents) > 1:
        limit = f"must be one of {_TEXT} (BYTES) and {_IDS} ({', '.join(_INTEGERS)})"
        raise InvalidRequestError("inputs", f"{len(request.inputs)} inputs", limit)
    tensor = request.inputs[0]
    raw = request.raw_input_contents[0] if request.raw_input_contents else None
    if tensor.name == _TEXT and tensor.datatype == "BYTES":
        parts = list(tensor.contents.bytes_contents) if raw is None else _texts(raw)
        if len(parts) == 1:
            try:
                return parts[0].decode()
            except UnicodeDecodeError:
                raise InvalidRequestError(_TEXT, f"{len(parts[0])} bytes", "must be UTF-8") from None
        raise InvalidRequestError(_TEXT, f"{len(parts)} texts", "must be one")
    if tensor.name == _IDS and tensor.datatype in _INTEGERS:
        kind, field = _INTEGERS[tensor.datatype]
        if raw is None:
            return list(getattr(tensor.contents, field))
        size = struct.calcsize(kind)
        if len(raw) % size == 0:
            return list(struct.unpack(f"<{len(raw) // size}{kind}", raw))
        raise InvalidRequestError(_IDS, f"{len(raw)} bytes", f"must be whole values of {tensor.datatype}")
    raise InvalidFieldsError(
        [InvalidRequestError(tensor.name, tensor.datatype, f"must be {_TEXT} (BYTES) or {_IDS} (integers)")]
    )


def _texts(raw: bytes) -> list[bytes]:
    """Each with its length before it, in four bytes."""
    found, at = [], 0
    while at + 4 <= len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(raw):
        raise InvalidRequestError(_TEXT, f"{len(raw)} bytes", "must be texts with their lengths before them")
    return found


def _response(
    request: oip.ModelInferRequest, card: pb.ModelCard, result: pb.GenerateResult, wanted: list[str]
) -> oip.ModelInferResponse:
    reason = REASONS[result.finished.finish_reason].encode()
    values: dict[str, list[Any]] = {
        "text_output": [result.text.encode()],
        "output_ids": list(result.token_ids),
        "finish_reason": [reason],
    }
    response = oip.ModelInferResponse(model_name=card.model, model_version=card.version, id=request.id)
    kinds = dict(_OUTPUTS)
    for name in wanted:
        response.outputs.add(name=name, datatype=kinds[name], shape=[len(values[name])])
        if kinds[name] == "BYTES":
            data = b"".join(struct.pack("<I", len(value)) + value for value in values[name])
        else:
            data = struct.pack(f"<{len(values[name])}q", *values[name])
        response.raw_output_contents.append(data)
    return response
