"""Every field goes over the wire and back; what cannot be honoured is named, all of it at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetflow_cluster.rpc import checks, convert, limits
from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import (
    FinishReason,
    GuessSource,
    LatencyClass,
    RequestDelta,
    RequestOutput,
    SamplingParams,
    SpeculationMode,
    SpeculationOptions,
    SpeculationStats,
    StepTree,
    TokenLogprobs,
    Usage,
)

NAN, INF = math.nan, math.inf
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
tokens = st.integers(0, limits.MAX_TOKEN_ID)
counts = st.integers(0, 2**32 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
top_logprobs = st.lists(st.tuples(tokens, finite), max_size=3).map(tuple)
logprobs = st.builds(TokenLogprobs, token_id=tokens, logprob=finite, top=top_logprobs)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 2**31 - 1))
    return SamplingParams(
        temperature=draw(st.just(0.0) | st.floats(1e-3, 100)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(st.none() | st.integers(0, 2**64 - 1)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop=draw(st.lists(text.filter(bool), max_size=4)),
        stop_token_ids=draw(st.lists(tokens, max_size=4)),
        ignore_eos=draw(st.booleans()),
        repetition_penalty=draw(st.floats(0, 10, exclude_min=True)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=draw(st.dictionaries(tokens, st.floats(-100, 100), max_size=4)),
        logprobs=draw(st.none() | st.integers(0, 64)),
        prompt_logprobs=draw(st.none() | st.integers(0, 64)),
        prior_output_token_ids=draw(st.lists(tokens, max_size=min(4, max_tokens - 1))),
        speculation=SpeculationOptions(
            mode=draw(st.sampled_from(SpeculationMode)),
            max_tree_nodes=draw(st.none() | st.integers(1, 512)),
            max_depth=draw(st.none() | st.integers(1, 64)),
            latency_class=draw(st.sampled_from(LatencyClass)),
            include_trees=draw(st.booleans()),
        ),
    )


trees = st.builds(
    StepTree,
    token_ids=st.lists(tokens, max_size=4),
    parents=st.lists(st.integers(-1, 511), max_size=4),
    path_logprobs=st.lists(st.floats(-1e3, 0, width=32), max_size=4),
    sources=st.lists(st.sampled_from(GuessSource), max_size=4),
    accepted_nodes=st.lists(st.integers(0, 511), max_size=4),
)


@unhurried
@given(sampling_params())
def test_sampling_goes_there_and_back(params: SamplingParams) -> None:
    sent = convert.sampling_to_proto(params).SerializeToString()
    assert convert.sampling_from_proto(pb.SamplingParams.FromString(sent)) == params


def test_an_empty_message_means_the_defaults() -> None:
    assert convert.sampling_from_proto(pb.SamplingParams()) == SamplingParams()
    assert convert.check_request(pb.GenerateRequest(text="x")) == SamplingParams()


def test_messages_have_every_field_of_the_types() -> None:
    def names(message: Any) -> set[str]:
        return {field.name for field in message.DESCRIPTOR.fields}

    def fields(kind: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    assert names(pb.SamplingParams) == fields(SamplingParams)
    assert names(pb.SpeculationOptions) == fields(SpeculationOptions)
    assert names(pb.Usage) == fields(Usage)
    assert names(pb.TokenLogprobs) == fields(TokenLogprobs)
    assert names(pb.DraftTree) == fields(StepTree)


@unhurried
@given(
    st.builds(
        RequestDelta,
        request_id=st.just("a"),
        offset=counts,
        token_ids=st.lists(tokens, max_size=4),
        text=text,
        logprobs=st.none() | st.lists(logprobs, max_size=3),
        num_accepted=counts,
        tree=st.none() | trees,
    )
)
def test_deltas_go_there_and_back(delta: RequestDelta) -> None:
    sent = pb.Delta.FromString(convert.delta_to_proto(delta).SerializeToString())
    assert convert.delta_from_proto(sent, "a", has_logprobs=delta.logprobs is not None) == delta


@unhurried
@given(
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT]),
    matched_stop=st.none() | text | tokens,
    usage=st.builds(Usage, prompt_tokens=counts, completion_tokens=counts, cached_tokens=counts),
    stats=st.builds(
        SpeculationStats,
        num_steps=counts,
        num_draft_nodes=counts,
        num_accepted_tokens=counts,
        accepted_per_step=st.lists(counts, max_size=5),
    ),
    prompt_logprobs=st.none() | st.lists(logprobs, max_size=3).map(lambda entries: [None, *entries]),
    num_resumes=counts,
)
def test_finishes_go_there_and_back(
    reason: FinishReason,
    matched_stop: str | int | None,
    usage: Usage,
    stats: SpeculationStats,
    prompt_logprobs: list[TokenLogprobs | None] | None,
    num_resumes: int,
) -> None:
    output = RequestOutput(
        request_id="a",
        prompt_token_ids=[],
        token_ids=[],
        text="",
        finish_reason=reason,
        matched_stop=matched_stop,
        usage=usage,
        speculation=stats,
        prompt_logprobs=prompt_logprobs,
    )
    made = convert.finished_to_proto(output, pb.Timing(queue_s=0.5), num_resumes=num_resumes)
    sent = pb.Finished.FromString(made.SerializeToString())
    assert convert.finish_reason_from_proto(sent.finish_reason) is reason
    assert convert.matched_stop_from_proto(sent) == matched_stop
    assert convert.usage_from_proto(sent.usage) == usage
    assert convert.speculation_from_proto(sent.speculation) == stats
    assert sent.speculation.mean_acceptance_length == stats.mean_acceptance_length
    assert convert.logprobs_from_proto(sent.prompt_logprobs) == (prompt_logprobs or [None])[1:]
    assert (sent.timing.queue_s, sent.num_resumes) == (0.5, num_resumes)


@pytest.mark.parametrize("reason", [None, FinishReason.ERROR])
def test_failures_have_no_event(reason: FinishReason | None) -> None:
    output = RequestOutput(request_id="a", prompt_token_ids=[], token_ids=[], text="", finish_reason=reason)
    with pytest.raises(ValueError, match="ended well"):
        convert.finished_to_proto(output)


def offending(request: pb.GenerateRequest) -> list[str]:
    with pytest.raises(InvalidFieldsError) as caught:
        convert.check_request(request)
    return [problem.field for problem in caught.value.problems]


@pytest.mark.parametrize(
    "fields, path",
    [
        *[pytest.param({"temperature": v}, "temperature", id=f"temperature-{v}") for v in (-1, 101, 1e-4, NAN, INF)],
        pytest.param({"top_k": 2**31}, "top_k", id="top-k"),
        *[pytest.param({"top_p": v}, "top_p", id=f"top-p-{v}") for v in (0, 1.5, -INF, NAN)],
        *[pytest.param({"min_p": v}, "min_p", id=f"min-p-{v}") for v in (-0.5, 1.5, NAN)],
        *[pytest.param({"max_tokens": v}, "max_tokens", id=f"max-tokens-{v}") for v in (0, 2**31)],
        pytest.param({"min_tokens": 17}, "min_tokens", id="min-tokens-above-default"),
        pytest.param({"min_tokens": 2**31}, "min_tokens", id="min-tokens"),
        pytest.param({"max_tokens": 30, "min_tokens": 31}, "min_tokens", id="min-tokens-above-max"),
        pytest.param({"stop": [""]}, "stop", id="stop-empty"),
        pytest.param({"stop": ["a"] * 33}, "stop", id="stop-many"),
        pytest.param({"stop": ["a" * (limits.MAX_STOP_CHARS + 1)]}, "stop", id="stop-long"),
        pytest.param({"stop_token_ids": [1, 2**31]}, "stop_token_ids", id="stop-token"),
        pytest.param({"stop_token_ids": [1] * (limits.MAX_STOP_TOKEN_IDS + 1)}, "stop_token_ids", id="stop-tokens"),
        *[pytest.param({"repetition_penalty": v}, "repetition_penalty", id=f"repetition-{v}") for v in (0, 11, NAN)],
        *[pytest.param({"presence_penalty": v}, "presence_penalty", id=f"presence-{v}") for v in (-3, 3, NAN)],
        *[pytest.param({"frequency_penalty": v}, "frequency_penalty", id=f"frequency-{v}") for v in (-3, 3, INF)],
        pytest.param({"logit_bias": {2**31: 1.0}}, "logit_bias", id="bias-token"),
        *[pytest.param({"logit_bias": {5: v}}, "logit_bias[5]", id=f"bias-{v}") for v in (-101, NAN, INF)],
        pytest.param({"logit_bias": dict.fromkeys(range(5000), 1.0)}, "logit_bias", id="biases"),
        pytest.param({"logprobs": 65}, "logprobs", id="logprobs"),
        pytest.param({"prompt_logprobs": 65}, "prompt_logprobs", id="prompt-logprobs"),
        pytest.param({"prior_output_token_ids": [2**31]}, "prior_output_token_ids", id="prior-token"),
        pytest.param({"prior_output_token_ids": [1] * 17}, "prior_output_token_ids", id="prior-above-default"),
        pytest.param(
            {"prior_output_token_ids": [1] * 4, "max_tokens": 3}, "prior_output_token_ids", id="prior-above-max"
        ),
        pytest.param(
            {"prior_output_token_ids": [1] * (limits.MAX_TOKEN_IDS + 1)}, "prior_output_token_ids", id="prior-many"
        ),
        pytest.param({"speculation": {"mode": 4}}, "speculation.mode", id="mode"),
        pytest.param({"speculation": {"mode": -1}}, "speculation.mode", id="mode-negative"),
        *[
            pytest.param({"speculation": {"max_tree_nodes": v}}, "speculation.max_tree_nodes", id=f"nodes-{v}")
            for v in (0, 513)
        ],
        pytest.param({"speculation": {"latency_class": 9}}, "speculation.latency_class", id="latency-class"),
        *[pytest.param({"speculation": {"max_depth": v}}, "speculation.max_depth", id=f"depth-{v}") for v in (0, 65)],
    ],
)
def test_sampling_fields_that_cannot_be_honoured_are_named(fields: dict[str, Any], path: str) -> None:
    assert offending(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**fields))) == [f"sampling.{path}"]


CHAT = pb.ChatMessage(role="user", content="x")


@pytest.mark.parametrize(
    "request_, path",
    [
        pytest.param(pb.GenerateRequest(), "input", id="no-input"),
        pytest.param(pb.GenerateRequest(text=""), "text", id="empty-text"),
        pytest.param(pb.GenerateRequest(text="é" * (2**21 + 1)), "text", id="long-text"),
        pytest.param(pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids", id="no-tokens"),
        pytest.param(pb.GenerateRequest(token_ids={"ids": [1] * (2**20 + 1)}), "token_ids.ids", id="many-tokens"),
        pytest.param(pb.GenerateRequest(token_ids={"ids": [2**32 - 1]}), "token_ids.ids", id="huge-token"),
        pytest.param(pb.GenerateRequest(chat=pb.ChatMessages()), "chat.messages", id="no-messages"),
        pytest.param(pb.GenerateRequest(chat={"messages": [CHAT] * 1025}), "chat.messages", id="many-messages"),
        pytest.param(
            pb.GenerateRequest(chat={"messages": [CHAT, {"content": "x"}]}), "chat.messages[1].role", id="no-role"
        ),
        pytest.param(
            pb.GenerateRequest(chat={"messages": [CHAT, {"role": "a" * 65}]}), "chat.messages[1].role", id="long-role"
        ),
        pytest.param(
            pb.GenerateRequest(chat={"messages": [{"role": "user", "content": "x" * 2**21}] * 3}),
            "chat.messages",
            id="long-chat",
        ),
        pytest.param(pb.GenerateRequest(text="x", request_id="a" * 129), "request_id", id="long-id"),
        pytest.param(pb.GenerateRequest(text="x", request_id="ä"), "request_id", id="id-not-ascii"),
        pytest.param(pb.GenerateRequest(text="x", request_id="a\x00"), "request_id", id="id-not-printable"),
        pytest.param(pb.GenerateRequest(text="x", session_id="a" * 129), "session_id", id="long-session"),
        pytest.param(pb.GenerateRequest(text="x", model="a" * 257), "model", id="long-model"),
        pytest.param(pb.GenerateRequest(text="x", model="a\n"), "model", id="model-not-printable"),
        pytest.param(pb.GenerateRequest(text="x", timeout_ms=0), "timeout_ms", id="no-time"),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(request_: pb.GenerateRequest, path: str) -> None:
    assert offending(request_) == [path]


def test_all_offending_fields_are_named_at_once() -> None:
    request = pb.GenerateRequest(
        request_id="\n",
        session_id="\n",
        model="\n",
        timeout_ms=0,
        sampling=pb.SamplingParams(
            temperature=NAN,
            top_k=2**31,
            top_p=0,
            min_p=2,
            max_tokens=0,
            min_tokens=2**31,
            stop=[""],
            stop_token_ids=[2**31],
            repetition_penalty=0,
            presence_penalty=9,
            frequency_penalty=9,
            logit_bias={1: INF},
            logprobs=99,
            prompt_logprobs=99,
            prior_output_token_ids=[2**31],
            speculation={"mode": 7, "max_tree_nodes": 0, "max_depth": 0},
        ),
    )
    found = offending(request)
    assert len(found) == len(set(found)) == 23
    assert {"input", "request_id", "session_id", "model", "timeout_ms", "sampling.speculation.max_depth"} <= set(found)


def any_value(field: Any) -> st.SearchStrategy[Any]:
    """Whatever the wire lets through for a field."""
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            return st.dictionaries(any_value(key), any_value(value), max_size=3)
        one = any_message(field.message_type)
    else:
        one = {
            field.CPPTYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 40),
            field.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
            field.CPPTYPE_DOUBLE: st.floats() | st.floats(0, 1),
            field.CPPTYPE_BOOL: st.booleans(),
            field.CPPTYPE_STRING: text,
            field.CPPTYPE_ENUM: st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3),
        }[field.cpp_type]
    return st.lists(one, max_size=3) if field.is_repeated else one


def any_message(descriptor: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={field.name: any_value(field) for field in descriptor.fields})


@unhurried
@given(any_message(pb.GenerateRequest.DESCRIPTOR))
def test_whatever_comes_is_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    message = pb.GenerateRequest(**fields)
    try:
        params = convert.check_request(message)
    except InvalidFieldsError as error:
        paths = [problem.field for problem in error.problems]
        status = StatusError.invalid_argument(error.problems)
    else:
        assert convert.sampling_from_proto(convert.sampling_to_proto(params)) == params
        return
    assert len(paths) == len(set(paths)) > 0
    # It has to fit into trailing metadata.
    assert len(status.to_proto().SerializeToString()) < 6000


@pytest.mark.parametrize(
    "check, message, path",
    [
        pytest.param(checks.check_tokenize, pb.TokenizeRequest(), "input", id="tokenize-nothing"),
        pytest.param(checks.check_tokenize, pb.TokenizeRequest(text=""), "text", id="tokenize-empty"),
        pytest.param(checks.check_detokenize, pb.DetokenizeRequest(token_ids=[2**31]), "token_ids", id="detokenize"),
        pytest.param(checks.check_abort, pb.AbortRequestRequest(request_ids=["a", ""]), "request_ids[1]", id="no-id"),
        pytest.param(
            checks.check_abort, pb.AbortRequestRequest(request_ids=["a"] * 1025), "request_ids", id="many-ids"
        ),
    ],
)
def test_other_requests_are_checked_too(check: Any, message: Any, path: str) -> None:
    with pytest.raises(InvalidFieldsError) as caught:
        check(message)
    assert caught.value.field == path


@pytest.mark.parametrize(
    "check, message",
    [
        (checks.check_tokenize, pb.TokenizeRequest(text="x")),
        (checks.check_detokenize, pb.DetokenizeRequest()),
        (checks.check_abort, pb.AbortRequestRequest()),
    ],
    ids=["tokenize", "detokenize-nothing", "abort-nothing"],
)
def test_other_requests_that_are_right_pass(check: Any, message: Any) -> None:
    check(message)
