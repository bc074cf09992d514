"""From a JSON body of the OpenAI API to a request of this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jetflow_cluster.router.web.fields import Fields
from jetflow_cluster.rpc import checks
from jetflow_cluster.rpc.convert import sampling_to_proto
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import InvalidRequestError, SamplingParams, SpeculationOptions

Kind = Literal["chat", "completion"]
#: A conversation may go on to the end of the context.
_NO_LIMIT = 2**31 - 1
_MAX_TOP_LOGPROBS = 20
#: Numbers whose names and meaning are those of `SamplingParams`.
_INTEGERS = ("seed", "top_k", "min_tokens")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
#: What is part of the API and would change the answer; the first value means what is done anyway.
_ONLY: dict[Kind, dict[str, list[Any]]] = {
    "chat": {
        "n": [1],
        "tools": [[]],
        "functions": [[]],
        "tool_choice": ["none", "auto"],
        "function_call": ["none", "auto"],
        "response_format": [{"type": "text"}],
        "modalities": [["text"]],
        "store": [False],
        "service_tier": ["auto", "default"],
    },
    "completion": {"n": [1], "best_of": [1], "echo": [False], "suffix": [""]},
}
#: Labels; they name who asks, and no answer depends on them.
_LABELS = ("user", "metadata", "safety_identifier", "parallel_tool_calls")


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """What a client asked for."""

    kind: Kind
    message: pb.GenerateRequest
    is_stream: bool
    #: Whether a stream tells the usage at its end.
    has_usage: bool
    #: Best others told per token; None is no log-probabilities.
    num_logprobs: int | None
    #: Whether token ids are told beside the text.
    has_token_ids: bool
    #: Whether each chunk of a stream tells its step's tree.
    has_trees: bool


def read_request(kind: Kind, body: dict[str, Any]) -> ApiRequest:
    """The request that a body means.

    Raises:
        InvalidFieldsError: naming every field that is unknown, has a wrong type, or cannot be honoured.
    """
    fields = Fields(body)
    message = pb.GenerateRequest()
    _read_input(kind, fields, message)
    num_logprobs = _read_logprobs(kind, fields)
    message.sampling.CopyFrom(_read_sampling(kind, fields, num_logprobs))
    message.model = fields.take("model", str, default="")
    message.request_id = fields.take("request_id", str, default="")
    message.session_id = fields.take("session_id", str) or fields.take("prompt_cache_key", str, default="")
    fields.ignore("prompt_cache_key", *_LABELS)
    timeout_ms = fields.take("timeout_ms", int)
    if timeout_ms is not None:
        if 1 <= timeout_ms < 2**32:
            message.timeout_ms = timeout_ms
        else:
            fields.refuse("timeout_ms", timeout_ms, f"must be in [1, {2**32 - 1}]")
    is_stream = fields.take("stream", bool, default=False)
    options = fields.take_object("stream_options")
    has_usage = options.take("include_usage", bool, default=False)
    options.only({"include_obfuscation": [False]})
    fields.adopt(options)
    has_token_ids = fields.take("return_token_ids", bool, default=False)
    has_trees = message.sampling.speculation.include_trees
    if has_trees and not is_stream:
        fields.refuse("speculation.include_trees", True, "only a stream tells trees: needs stream = true")
    fields.only(_ONLY[kind])
    checks.refuse([*fields.problems, *fields.unknown()])
    return ApiRequest(
        kind=kind,
        message=message,
        is_stream=is_stream,
        has_usage=has_usage,
        num_logprobs=num_logprobs,
        has_token_ids=has_token_ids,
        has_trees=has_trees,
    )


def _read_input(kind: Kind, fields: Fields, message: pb.GenerateRequest) -> None:
    if kind == "chat":
        for index, item in enumerate(fields.take("messages", list, default=[])):
            if not isinstance(item, dict):
                fields.refuse(f"messages[{index}]", item, "must be an object")
                return
            _read_message(fields, index, item, message.chat.messages.add())
        if not message.chat.messages:
            fields.refuse("messages", [], "must be at least one message")
        return
    prompt = fields.take("prompt", str, list, default="")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        message.text = prompt
    elif all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        message.token_ids.ids.extend(prompt)
    else:
        fields.refuse("prompt", prompt, "must be one text or one list of token ids; send several as several requests")


def _read_message(fields: Fields, index: int, item: dict[str, Any], message: pb.ChatMessage) -> None:
    inner = Fields(item, f"messages[{index}].")
    message.role = inner.take("role", str, default="")
    content = inner.take("content", str, list, default="")
    inner.only({"name": [""], "tool_calls": [[]], "refusal": [""]})
    if isinstance(content, str):
        message.content = content
    else:
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part.get("text") for part in parts]
        if len(parts) == len(content) and all(isinstance(text, str) for text in texts):
            message.content = "".join(str(text) for text in texts)
        else:
            inner.refuse("content", content, "must be text, or parts of type 'text'")
    fields.adopt(inner)


def _read_logprobs(kind: Kind, fields: Fields) -> int | None:
    if kind == "completion":
        return fields.take("logprobs", int)
    wanted = fields.take("logprobs", bool, default=False)
    num_top = fields.take("top_logprobs", int)
    if num_top is not None and (not wanted or not 0 <= num_top <= _MAX_TOP_LOGPROBS):
        fields.refuse("top_logprobs", num_top, f"must be in [0, {_MAX_TOP_LOGPROBS}], and needs logprobs = true")
    return (num_top or 0) if wanted else None


def _read_sampling(kind: Kind, fields: Fields, num_logprobs: int | None) -> pb.SamplingParams:
    found: dict[str, Any] = {name: fields.take(name, int) for name in _INTEGERS}
    found |= {name: fields.take(name, float) for name in _NUMBERS}
    found["ignore_eos"] = fields.take("ignore_eos", bool)
    found["logprobs"] = num_logprobs
    found["max_tokens"] = fields.take("max_tokens", int)
    if kind == "chat":
        longest = fields.take("max_completion_tokens", int)
        if longest is not None and found["max_tokens"] not in (None, longest):
            fields.refuse("max_tokens", found["max_tokens"], "is an older name of max_completion_tokens: give one")
        given = found["max_tokens"] if longest is None else longest
        found["max_tokens"] = _NO_LIMIT if given is None else given
    found = {name: value for name, value in found.items() if value is not None}
    stop = fields.take("stop", str, list, default=[])
    if isinstance(stop, list) and not all(isinstance(text, str) for text in stop):
        fields.refuse("stop", stop, "must be a string or strings")
        stop = []
    found["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    found["stop_token_ids"] = tuple(fields.take_list("stop_token_ids", int))
    found["logit_bias"] = _read_bias(fields)
    found["prior_output_token_ids"] = ()
    found.setdefault("min_tokens", 0)
    options = fields.take_object("speculation")
    speculation = {"mode": options.take("mode", str)}
    speculation |= {name: options.take(name, int) for name in ("max_tree_nodes", "max_depth")}
    speculation |= {"include_trees": options.take("include_trees", bool)}
    speculation = {name: value for name, value in speculation.items() if value is not None}
    fields.adopt(options)
    try:
        checks.refuse(checks.size_problems(found))
        return sampling_to_proto(SamplingParams(**found, speculation=SpeculationOptions(**speculation)))
    except InvalidRequestError as error:
        fields.problems += list(checks.sampling_problems(found, speculation)) or [error]
    return pb.SamplingParams()


def _read_bias(fields: Fields) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in fields.take("logit_bias", dict, default={}).items():
        if key.isascii() and key.isdigit() and len(key) <= 10 and type(value) in (int, float):
            found[int(key)] = float(value)
        else:
            fields.refuse(f"logit_bias[{key[:20]}]", value, "must be a number, with a token id as its name")
    return found
