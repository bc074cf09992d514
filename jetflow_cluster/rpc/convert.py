"""Between messages of the API and the types of `jetflow_cluster.types`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.errors import InvalidFieldsError
from jetflow_cluster.rpc.trees import tree_from_proto, tree_to_proto
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import (
    FinishReason,
    InvalidRequestError,
    LatencyClass,
    RequestDelta,
    RequestOutput,
    SamplingParams,
    SpeculationMode,
    SpeculationOptions,
    SpeculationStats,
    TokenLogprobs,
    Usage,
)

_MODES: dict[int, SpeculationMode] = {
    pb.SPECULATION_MODE_UNSPECIFIED: SpeculationMode.AUTO,
    pb.SPECULATION_MODE_AUTO: SpeculationMode.AUTO,
    pb.SPECULATION_MODE_OFF: SpeculationMode.OFF,
    pb.SPECULATION_MODE_FORCE: SpeculationMode.FORCE,
}
_CLASSES: dict[int, LatencyClass] = {
    pb.LATENCY_CLASS_UNSPECIFIED: LatencyClass.NORMAL,
    pb.LATENCY_CLASS_NORMAL: LatencyClass.NORMAL,
    pb.LATENCY_CLASS_INTERACTIVE: LatencyClass.INTERACTIVE,
    pb.LATENCY_CLASS_BATCH: LatencyClass.BATCH,
}
_CLASSES_TO_PROTO = {latency_class: number for number, latency_class in _CLASSES.items()}
_MODES_TO_PROTO = {mode: number for number, mode in _MODES.items()}
_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}
_REASONS_TO_PROTO = {reason: number for number, reason in _REASONS.items()}
#: Fields of `SamplingParams` that the message leaves out to mean the default.
_OPTIONAL = ("temperature", "top_p", "seed", "max_tokens", "repetition_penalty", "logprobs", "prompt_logprobs")
_ALWAYS = ("top_k", "min_p", "min_tokens", "ignore_eos", "presence_penalty", "frequency_penalty")
_LISTS = ("stop", "stop_token_ids", "prior_output_token_ids")


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """The parameters that a message names; what it leaves out has its default.

    Raises:
        InvalidFieldsError: naming every offending field, as ``sampling.temperature``.
    """
    fields, speculation = _sampling_fields(message)
    try:
        checks.refuse(checks.size_problems(fields))
        return SamplingParams(**fields, speculation=SpeculationOptions(**speculation))
    except InvalidRequestError as error:
        found = list(checks.sampling_problems(fields, speculation)) or [error]
    raise InvalidFieldsError(InvalidRequestError(f"sampling.{p.field}", p.value, p.limit) for p in found)


def _sampling_fields(message: pb.SamplingParams) -> tuple[dict[str, Any], dict[str, Any]]:
    fields: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    fields |= {name: getattr(message, name) for name in _ALWAYS}
    fields |= {name: tuple(getattr(message, name)) for name in _LISTS}
    fields["logit_bias"] = dict(message.logit_bias)
    options = message.speculation
    # An enumeration of proto3 is open: a number without a name stays a number, which is no mode.
    speculation: dict[str, Any] = {
        "mode": _MODES.get(options.mode, options.mode),
        "latency_class": _CLASSES.get(options.latency_class, options.latency_class),
        "include_trees": options.include_trees,
    }
    speculation |= {name: getattr(options, name) for name in ("max_tree_nodes", "max_depth") if options.HasField(name)}
    return fields, speculation


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """The message that says all of the parameters, defaults included."""
    values = {name: getattr(params, name) for name in (*_OPTIONAL, *_ALWAYS)}
    return pb.SamplingParams(
        **{name: value for name, value in values.items() if value is not None},
        **{name: getattr(params, name) for name in _LISTS},
        logit_bias=dict(params.logit_bias),
        speculation=pb.SpeculationOptions(
            mode=_MODES_TO_PROTO[SpeculationMode(params.speculation.mode)],  # type: ignore[arg-type]
            max_tree_nodes=params.speculation.max_tree_nodes,
            max_depth=params.speculation.max_depth,
            latency_class=_CLASSES_TO_PROTO[LatencyClass(params.speculation.latency_class)],  # type: ignore[arg-type]
            include_trees=params.speculation.include_trees,
        ),
    )


def check_request(message: pb.GenerateRequest) -> SamplingParams:
    """Checks a request whole and returns its sampling parameters.

    What only the model knows (its name, vocabulary and context length) is not checked here.

    Raises:
        InvalidFieldsError: naming every offending field by its path in the message.
    """
    problems = [
        *checks.id_problems("request_id", message.request_id),
        *checks.input_problems(message),
        *checks.model_problems("model", message.model),
        *checks.id_problems("session_id", message.session_id),
    ]
    if message.HasField("timeout_ms") and message.timeout_ms == 0:
        problems.append(InvalidRequestError("timeout_ms", 0, "must be at least 1"))
    try:
        params = sampling_from_proto(message.sampling)
    except InvalidFieldsError as error:
        problems += error.problems
    checks.refuse(problems)
    return params


def started_to_proto(
    *,
    request_id: str,
    replica_id: str,
    model: str,
    seed: int,
    prompt_token_ids: Sequence[int],
    echo_prompt: bool = False,
    arithmetic: str = "",
) -> pb.Started:
    """The first event of a stream.

    Args:
        request_id: under which the request can be aborted.
        replica_id: where it runs.
        model: name of the served model.
        seed: of the noise; the request's own or the one that was drawn.
        prompt_token_ids: what the input was encoded to.
        echo_prompt: whether the client is told these, because it sent something else.
        arithmetic: what the output is computed in.
    """
    return pb.Started(
        request_id=request_id,
        replica_id=replica_id,
        model=model,
        seed=seed,
        prompt_tokens=len(prompt_token_ids),
        prompt_token_ids=prompt_token_ids if echo_prompt else (),
        arithmetic=arithmetic,
    )


def delta_to_proto(delta: RequestDelta) -> pb.Delta:
    """One step's tokens. The finish reason is not part of it; `finished_to_proto` tells it."""
    return pb.Delta(
        seq_offset=delta.offset,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=logprobs_to_proto(delta.logprobs),
        num_accepted=delta.num_accepted,
        tree=None if delta.tree is None else tree_to_proto(delta.tree),
    )


def delta_from_proto(message: pb.Delta, request_id: str, *, has_logprobs: bool = False) -> RequestDelta:
    """One step's tokens; `has_logprobs` tells an empty list from none."""
    return RequestDelta(
        request_id=request_id,
        offset=message.seq_offset,
        token_ids=list(message.token_ids),
        text=message.text,
        logprobs=logprobs_from_proto(message.logprobs) if has_logprobs else None,
        num_accepted=message.num_accepted,
        tree=tree_from_proto(message.tree) if message.HasField("tree") else None,
    )


def logprobs_to_proto(entries: Iterable[TokenLogprobs] | None) -> list[pb.TokenLogprobs]:
    """Log-probabilities of tokens; None gives an empty list."""
    return [
        pb.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in entries or ()
    ]


def logprobs_from_proto(messages: Iterable[pb.TokenLogprobs]) -> list[TokenLogprobs]:
    """Log-probabilities of tokens."""
    return [
        TokenLogprobs(
            token_id=message.token_id,
            logprob=message.logprob,
            top=tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    ]


def finished_to_proto(output: RequestOutput, timing: pb.Timing | None = None, *, num_resumes: int = 0) -> pb.Finished:
    """The last event of a stream.

    Args:
        output: of a request that stopped, reached its length, or was aborted.
        timing: as this server saw it.
        num_resumes: times that another replica took the request over.

    Raises:
        ValueError: the request runs, or failed: a failure is a status and no event.
    """
    if output.finish_reason not in _REASONS_TO_PROTO:
        raise ValueError(f"finish_reason = {output.finish_reason!r}: only a request that ended well has an event")
    is_string, is_token = (isinstance(output.matched_stop, kind) for kind in (str, int))
    # The first token has no log-probability.
    prompt_logprobs = [entry for entry in output.prompt_logprobs or () if entry is not None]
    return pb.Finished(
        finish_reason=_REASONS_TO_PROTO[output.finish_reason],  # type: ignore[arg-type]
        matched_stop_string=output.matched_stop if is_string else None,  # type: ignore[arg-type]
        matched_stop_token_id=output.matched_stop if is_token else None,  # type: ignore[arg-type]
        usage=pb.Usage(
            prompt_tokens=output.usage.prompt_tokens,
            completion_tokens=output.usage.completion_tokens,
            cached_tokens=output.usage.cached_tokens,
        ),
        speculation=speculation_to_proto(output.speculation),
        timing=timing,
        num_resumes=num_resumes,
        prompt_logprobs=logprobs_to_proto(prompt_logprobs),
    )


def speculation_to_proto(stats: SpeculationStats) -> pb.SpeculationStats:
    """What speculation did for one request."""
    return pb.SpeculationStats(
        num_spec_steps=stats.num_steps,
        num_draft_nodes=stats.num_draft_nodes,
        num_accepted_draft_tokens=stats.num_accepted_tokens,
        mean_acceptance_length=stats.mean_acceptance_length,
        acceptance_histogram=stats.accepted_per_step,
    )


def speculation_from_proto(message: pb.SpeculationStats) -> SpeculationStats:
    """What speculation did for one request."""
    return SpeculationStats(
        num_steps=message.num_spec_steps,
        num_draft_nodes=message.num_draft_nodes,
        num_accepted_tokens=message.num_accepted_draft_tokens,
        accepted_per_step=list(message.acceptance_histogram),
    )


def usage_from_proto(message: pb.Usage) -> Usage:
    """Token counts of one request."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def finish_reason_from_proto(number: int) -> FinishReason:
    """Why a request ended.

    Raises:
        ValueError: a reason of which this version does not know.
    """
    if number not in _REASONS:
        raise ValueError(f"finish_reason = {number}: must be one of {', '.join(_REASONS.values())}")
    return _REASONS[number]


def matched_stop_from_proto(message: pb.Finished) -> str | int | None:
    """The stop string or token id that ended the output."""
    kind = message.WhichOneof("matched_stop")
    return None if kind is None else getattr(message, kind)
