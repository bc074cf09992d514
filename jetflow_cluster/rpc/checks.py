"""What a request may hold, checked whole: every offending field is found, by its path in the message.

Each function returns the problems it found. What `SamplingParams` checks itself is not repeated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jetflow_cluster.rpc import limits
from jetflow_cluster.rpc.errors import InvalidFieldsError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import InvalidRequestError, SamplingParams, SpeculationOptions

Problems = Iterator[InvalidRequestError]


def refuse(problems: Iterable[InvalidRequestError]) -> None:
    """Raises `InvalidFieldsError` if there is any problem."""
    found = tuple(problems)
    if found:
        raise InvalidFieldsError(found)


def id_problems(path: str, value: str, *, optional: bool = True) -> Problems:
    """Of an id that a caller chose: printable ASCII of limited length; empty only where it may be left out."""
    is_printable = value.isascii() and value.isprintable()
    if not is_printable or len(value) > limits.MAX_ID_CHARS or not (value or optional):
        least = "0" if optional else "1"
        yield InvalidRequestError(
            path, value[: limits.MAX_ID_CHARS], f"must be {least} to {limits.MAX_ID_CHARS} printable ASCII characters"
        )


def model_problems(path: str, value: str) -> Problems:
    """Of a model's name."""
    if len(value) > limits.MAX_MODEL_CHARS or not value.isprintable():
        limit = f"must be at most {limits.MAX_MODEL_CHARS} printable characters"
        yield InvalidRequestError(path, value[: limits.MAX_MODEL_CHARS], limit)


def text_problems(path: str, text: str) -> Problems:
    """Of a text to be encoded."""
    if not text:
        yield InvalidRequestError(path, text, "must not be empty")
    elif len(text) > limits.MAX_TEXT_BYTES or len(text.encode()) > limits.MAX_TEXT_BYTES:
        yield InvalidRequestError(path, f"{len(text)} characters", f"must be at most {limits.MAX_TEXT_BYTES} bytes")


def token_problems(path: str, token_ids: Sequence[int], *, may_be_empty: bool = False) -> Problems:
    """Of a list of token ids; the vocabulary's size is not known here."""
    count = len(token_ids)
    if count > limits.MAX_TOKEN_IDS or not (count or may_be_empty):
        least = 0 if may_be_empty else 1
        yield InvalidRequestError(path, f"{count} tokens", f"must be {least} to {limits.MAX_TOKEN_IDS} token ids")
    elif count and (largest := max(token_ids)) > limits.MAX_TOKEN_ID:
        yield InvalidRequestError(path, largest, f"must be token ids in [0, {limits.MAX_TOKEN_ID}]")


def chat_problems(path: str, chat: pb.ChatMessages) -> Problems:
    """Of a conversation: of its messages the first that offends is named."""
    count = len(chat.messages)
    if not 1 <= count <= limits.MAX_CHAT_MESSAGES:
        limit = f"must be 1 to {limits.MAX_CHAT_MESSAGES} messages"
        yield InvalidRequestError(f"{path}.messages", f"{count} messages", limit)
        return
    for index, message in enumerate(chat.messages):
        if not 1 <= len(message.role) <= limits.MAX_ROLE_CHARS:
            limit = f"must be 1 to {limits.MAX_ROLE_CHARS} characters"
            yield InvalidRequestError(f"{path}.messages[{index}].role", message.role[: limits.MAX_ROLE_CHARS], limit)
            break
    num_bytes = sum(len(message.content.encode()) for message in chat.messages)
    if num_bytes > limits.MAX_TEXT_BYTES:
        limit = f"must be at most {limits.MAX_TEXT_BYTES} bytes in all"
        yield InvalidRequestError(f"{path}.messages", f"{num_bytes} bytes", limit)


def input_problems(message: Any) -> Problems:
    """Of the ``input`` of a `GenerateRequest` or `TokenizeRequest`."""
    kind = message.WhichOneof("input")
    if kind == "text":
        yield from text_problems("text", message.text)
    elif kind == "token_ids":
        yield from token_problems("token_ids.ids", message.token_ids.ids)
    elif kind == "chat":
        yield from chat_problems("chat", message.chat)
    else:
        yield InvalidRequestError("input", None, "text, token ids or chat messages must be given")


def check_tokenize(message: pb.TokenizeRequest) -> None:
    """Checks the request whole.

    Raises:
        InvalidFieldsError: naming every offending field.
    """
    refuse(input_problems(message))


def check_detokenize(message: pb.DetokenizeRequest) -> None:
    """Checks the request whole.

    Raises:
        InvalidFieldsError: naming every offending field.
    """
    refuse(token_problems("token_ids", message.token_ids, may_be_empty=True))


def check_abort(message: pb.AbortRequestRequest) -> None:
    """Checks the request whole.

    Raises:
        InvalidFieldsError: naming every offending field.
    """
    count = len(message.request_ids)
    if count > limits.MAX_ABORT_IDS:
        refuse([InvalidRequestError("request_ids", f"{count} ids", f"must be at most {limits.MAX_ABORT_IDS} ids")])
    refuse(
        problem
        for index, value in enumerate(message.request_ids)
        for problem in id_problems(f"request_ids[{index}]", value, optional=False)
    )


def size_problems(fields: dict[str, Any]) -> Problems:
    """Of sampling fields that are too long to be looked at one by one."""
    yield from token_problems("prior_output_token_ids", fields["prior_output_token_ids"], may_be_empty=True)
    most = {"logit_bias": limits.MAX_LOGIT_BIASES, "stop_token_ids": limits.MAX_STOP_TOKEN_IDS}
    for name, limit in most.items():
        if len(fields[name]) > limit:
            yield InvalidRequestError(name, f"{len(fields[name])} entries", f"must be at most {limit} entries")
    longest = max(map(len, fields["stop"]), default=0)
    if longest > limits.MAX_STOP_CHARS:
        yield InvalidRequestError("stop", f"{longest} characters", f"must be at most {limits.MAX_STOP_CHARS} each")


def sampling_problems(fields: dict[str, Any], speculation: dict[str, Any]) -> Problems:
    """Of sampling fields that `SamplingParams` and `SpeculationOptions` refuse: each is tried alone.

    Args:
        fields: by the names of `SamplingParams`, ``speculation`` left out.
        speculation: by the names of `SpeculationOptions`.
    """
    offending: set[str] = set()
    for too_long in size_problems(fields):
        offending.add(too_long.field)
        yield too_long
    # The ids of prior output were looked at above, and may be a million.
    for name, value in fields.items():
        if name in offending or name == "prior_output_token_ids":
            continue
        if (problem := _refusal(name, **{"max_tokens": _ANY, name: value})) is not None:
            offending.add(name)
            yield problem
    for name in ("min_tokens", "prior_output_token_ids"):
        if not offending & {name, "max_tokens"}:
            together = {name: fields[name], "max_tokens": fields.get("max_tokens", SamplingParams().max_tokens)}
            if problem := _refusal(name, **together):
                yield problem
    for name, value in speculation.items():
        try:
            SpeculationOptions(**{name: value})
        except InvalidRequestError as error:
            yield error


#: A `max_tokens` that stands in nobody's way.
_ANY = 2**31 - 1


def _refusal(name: str, **fields: Any) -> InvalidRequestError | None:
    try:
        SamplingParams(**fields)
    except InvalidRequestError as error:
        # An entry of a map or list keeps its own path.
        field = error.field if error.field.startswith(f"{name}[") else name
        return InvalidRequestError(field, error.value, error.limit)
    return None
