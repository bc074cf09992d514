"""From what a router submits to a request that the engine takes."""

from __future__ import annotations

from collections.abc import Iterable

from jetflow_cluster.cluster.replica.events import logprobs_bytes
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.request import Request
from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.convert import sampling_from_proto
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.types import InvalidRequestError, SamplingParams

#: What the front end checks beside the sampling parameters.
_OTHER_FIELDS = ("prompt", "request_id")


def request_from_proto(frontend: EngineFrontend, submit: rpb.Submit, *, key: str, max_logprobs_bytes: int) -> Request:
    """A checked request.

    Args:
        frontend: of the engine that is to run it.
        submit: what a router sent.
        key: the request's id in the engine.
        max_logprobs_bytes: the prompt's log-probabilities may take; they go out in one piece.

    Raises:
        InvalidRequestError: naming the field by its path in `GenerateRequest`, where it has one there.
    """
    _refuse(checks.id_problems("request_id", submit.request_id, optional=False))
    _refuse(checks.token_problems("token_ids.ids", submit.token_ids))
    if submit.HasField("timeout_ms") and not submit.timeout_ms:
        raise InvalidRequestError("timeout_ms", 0, "must be at least 1")
    params = sampling_from_proto(submit.sampling)
    _check_logprobs(len(submit.token_ids), params, max_logprobs_bytes)
    try:
        return frontend.make_request(key, list(submit.token_ids), params)
    except InvalidRequestError as error:
        if error.field in _OTHER_FIELDS:
            raise
        raise InvalidRequestError(f"sampling.{error.field}", error.value, error.limit) from None


def _check_logprobs(num_prompt_tokens: int, params: SamplingParams, max_bytes: int) -> None:
    num_top = params.prompt_logprobs
    if num_top is not None and logprobs_bytes(num_prompt_tokens, num_top) > max_bytes:
        most = max_bytes // logprobs_bytes(1, num_top)
        limit = f"with this many, a prompt of {num_prompt_tokens} tokens is too long: at most {most}"
        raise InvalidRequestError("sampling.prompt_logprobs", num_top, limit)


def _refuse(problems: Iterable[InvalidRequestError]) -> None:
    for problem in problems:
        raise problem
