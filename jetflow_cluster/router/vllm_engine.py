"""`vllm.grpc.engine.VllmEngine`, for gateways that speak it: token ids in, token ids out, by the path of every request.

Its messages come from the package ``smg-grpc-proto`` (extra ``gateway``); nobody else imports this module.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from jetflow_cluster.router.servicer import InferenceServicer
from jetflow_cluster.router.version import installed_version
from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import InvalidRequestError

#: Without a limit a request may go on to the end of the context.
_NO_LIMIT = 2**31 - 1
_SAME = ("min_p", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos", "top_k")
#: Zero of these stands for leaving them out.
_ZERO_IS_NONE = ("top_p", "repetition_penalty")
_REASONS: dict[int, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Generate, Abort, HealthCheck, GetModelInfo, GetServerInfo, GetLoads; the other methods are UNIMPLEMENTED.

    Args:
        servicer: answers.
        is_serving: whether requests can be served now.
        tokenizer: path of the model's tokenizer, which a gateway may read.
    """

    def __init__(self, servicer: InferenceServicer, is_serving: Callable[[], bool], tokenizer: str | None):
        self._servicer, self._is_serving, self._tokenizer = servicer, is_serving, tokenizer or ""
        self._began, self._heard_at = time.monotonic(), 0.0

    async def Generate(self, request: Any, context: Any) -> None:
        """One request: a chunk per step if it is a stream, and the whole at the end."""
        self._heard_at = time.time()
        message = _message(request)
        answer = _Answer(request.sampling_params.HasField("prompt_logprobs"))

        async def emit(event: pb.GenerateEvent) -> None:
            for response in answer.responses(event, is_stream=request.stream):
                await context.write(response)

        left_s, headers = context.time_remaining(), context.invocation_metadata() or ()
        await self._servicer.generate(message, emit, time_left_s=left_s, headers=headers)

    async def Abort(self, request: Any, context: Any) -> Any:
        """Ends requests, whichever router they came through."""
        await self._servicer.AbortRequest(pb.AbortRequestRequest(request_ids=request.request_ids), context)
        return vllm.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        """Whether requests can be served now."""
        is_serving = self._is_serving()
        return vllm.HealthCheckResponse(healthy=is_serving, message="" if is_serving else "no replica is healthy")

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        """What is served."""
        card = await self._servicer.card("")
        return vllm.GetModelInfoResponse(
            model_path=card.model,
            served_model_name=card.model,
            tokenizer_path=self._tokenizer,
            is_generation=True,
            max_context_length=card.max_model_len,
            max_req_input_len=card.max_model_len - 1,
            vocab_size=card.vocab_size,
            architectures=[card.architecture],
            eos_token_ids=card.eos_token_ids,
        )

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        """How much this router has to do."""
        card = await self._servicer.card("")
        return vllm.GetServerInfoResponse(
            active_requests=self._servicer.num_running,
            last_receive_timestamp=self._heard_at,
            uptime_seconds=time.monotonic() - self._began,
            server_type="vllm-grpc",
            data_parallel_size=1,
            model_dtype=card.dtype,
        )

    async def GetLoads(self, request: Any, context: Any) -> Any:
        """The load of every replica, each as a rank."""
        loads = [_load(rank, load) for rank, load in enumerate(self._servicer.load().replicas)]
        wanted = [load for load in loads if not request.HasField("dp_rank") or load.dp_rank == request.dp_rank]
        now = datetime.datetime.now(datetime.UTC).isoformat()
        return vllm.GetLoadsResponse(timestamp=now, version=installed_version(), dp_rank_count=len(loads), loads=wanted)


def _message(request: Any) -> pb.GenerateRequest:
    """The request in this API's terms.

    Raises:
        InvalidFieldsError: naming what cannot be honoured.
    """
    checks.refuse(_problems(request))
    message = pb.GenerateRequest(request_id=request.request_id)
    if request.WhichOneof("input") == "text":
        message.text = request.text
    else:
        message.token_ids.ids.extend(request.tokenized.input_ids)
    given, sampling = request.sampling_params, message.sampling
    for name in _SAME:
        setattr(sampling, name, getattr(given, name))
    for name in _ZERO_IS_NONE:
        if value := getattr(given, name):
            setattr(sampling, name, value)
    for name in ("temperature", "seed", "logprobs", "prompt_logprobs"):
        if given.HasField(name):
            setattr(sampling, name, getattr(given, name))
    sampling.max_tokens = given.max_tokens if given.HasField("max_tokens") else _NO_LIMIT
    sampling.stop.extend(given.stop)
    sampling.stop_token_ids.extend(given.stop_token_ids)
    for token, bias in given.logit_bias.items():
        sampling.logit_bias[token] = bias
    return message


def _problems(request: Any) -> Iterator[InvalidRequestError]:
    given = request.sampling_params
    for name in ("mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json", "data_parallel_rank"):
        if request.HasField(name):
            yield InvalidRequestError(name, "a value", "is not supported")
    if request.extra_mm_inputs:
        yield InvalidRequestError("extra_mm_inputs", f"{len(request.extra_mm_inputs)} inputs", "is not supported")
    if given.n > 1:
        yield InvalidRequestError("sampling_params.n", given.n, "must be 1")
    if (constraint := given.WhichOneof("constraint")) is not None:
        yield InvalidRequestError(f"sampling_params.{constraint}", "a value", "is not supported")
    if given.include_stop_str_in_output:
        yield InvalidRequestError("sampling_params.include_stop_str_in_output", True, "is not supported")
    if given.HasField("truncate_prompt_tokens"):
        limit = "is not supported"
        yield InvalidRequestError("sampling_params.truncate_prompt_tokens", given.truncate_prompt_tokens, limit)
    for name in ("seed", "logprobs", "prompt_logprobs"):
        if given.HasField(name) and getattr(given, name) < 0:
            yield InvalidRequestError(f"sampling_params.{name}", getattr(given, name), "must not be negative")
    if any(token < 0 for token in given.logit_bias):
        yield InvalidRequestError("sampling_params.logit_bias", min(given.logit_bias), "must be token ids")


class _Answer:
    """What was told so far."""

    def __init__(self, has_prompt_logprobs: bool):
        self._has_prompt_logprobs = has_prompt_logprobs
        self._started = pb.Started()
        self._token_ids: list[int] = []
        self._logprobs: list[pb.TokenLogprobs] = []

    def responses(self, event: pb.GenerateEvent, *, is_stream: bool) -> Iterator[Any]:
        """What an event means to the gateway."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
        elif kind == "delta":
            self._token_ids.extend(event.delta.token_ids)
            self._logprobs.extend(event.delta.logprobs)
            if is_stream and event.delta.token_ids:
                yield vllm.GenerateResponse(chunk=self._chunk(event.delta))
        else:
            yield vllm.GenerateResponse(complete=self._complete(event.finished))

    def _chunk(self, delta: pb.Delta) -> Any:
        return vllm.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self._started.prompt_tokens,
            completion_tokens=len(self._token_ids),
            output_logprobs=_output_logprobs(delta.logprobs),
        )

    def _complete(self, finished: pb.Finished) -> Any:
        usage, stats = finished.usage, finished.speculation
        complete = vllm.GenerateComplete(
            output_ids=self._token_ids,
            finish_reason=_REASONS[finished.finish_reason],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            output_logprobs=_output_logprobs(self._logprobs),
            spec_accepted_tokens=stats.num_accepted_draft_tokens,
            spec_draft_tokens=stats.num_draft_nodes,
        )
        which = finished.WhichOneof("matched_stop")
        if which == "matched_stop_string":
            complete.matched_stop_str = finished.matched_stop_string
        elif which == "matched_stop_token_id":
            complete.matched_token_id = finished.matched_stop_token_id
        if self._has_prompt_logprobs:
            for entry in finished.prompt_logprobs:
                complete.input_logprobs.token_logprobs.add(value=entry.logprob)
                complete.input_logprobs.token_ids.append(entry.token_id)
                complete.input_logprobs.top_logprobs.append(_top(entry))
        return complete


def _output_logprobs(entries: Iterable[pb.TokenLogprobs]) -> Any:
    found = vllm.OutputLogProbs()
    for entry in entries:
        found.token_logprobs.append(entry.logprob)
        found.token_ids.append(entry.token_id)
        found.top_logprobs.append(_top(entry))
    return found if found.token_ids else None


def _top(entry: pb.TokenLogprobs) -> Any:
    values, token_ids = [top.logprob for top in entry.top], [top.token_id for top in entry.top]
    return vllm.TopLogProbs(values=values, token_ids=token_ids)


def _load(rank: int, load: pb.ReplicaLoad) -> Any:
    num_used = load.num_pages - load.num_free_pages - load.num_cached_pages
    return vllm.SchedulerLoad(
        dp_rank=rank,
        num_running_reqs=load.num_running,
        num_waiting_reqs=load.num_waiting,
        num_total_reqs=load.num_running + load.num_waiting,
        token_usage=num_used / load.num_pages if load.num_pages else 0.0,
        gen_throughput=load.tokens_per_s,
    )
