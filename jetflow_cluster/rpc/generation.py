"""One request as a client sees it, over as many calls as it takes. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jetflow_cluster.rpc import convert
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.limits import MAX_ID_CHARS
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import (
    FinishReason,
    InvalidRequestError,
    RequestDelta,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

#: Text, token ids, or messages with ``role`` and ``content``.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def request_to_proto(
    prompt: Prompt, params: SamplingParams, *, request_id: str = "", model: str = "", session_id: str = ""
) -> pb.GenerateRequest:
    """A checked request.

    Raises:
        InvalidRequestError: naming every offending field.
    """
    try:
        message = pb.GenerateRequest(
            request_id=request_id, model=model, session_id=session_id, sampling=convert.sampling_to_proto(params)
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("request", str(error), "has a value of the wrong type") from error
    set_input(message, prompt)
    convert.check_request(message)
    return message


def refuse_trees(params: SamplingParams | None) -> None:
    """Raises InvalidRequestError if trees are asked for where no delta is seen."""
    if params is not None:
        params.speculation.refuse_trees()


def set_input(message: pb.GenerateRequest | pb.TokenizeRequest, prompt: Prompt) -> None:
    """Puts a prompt into a message.

    Raises:
        InvalidRequestError: it is neither text nor token ids nor messages.
    """
    try:
        if isinstance(prompt, str):
            message.text = prompt
        elif prompt and isinstance(prompt[0], Mapping):
            message.chat.messages.extend(pb.ChatMessage(**entry) for entry in prompt)  # type: ignore[arg-type]
        elif isinstance(message, pb.GenerateRequest):
            message.token_ids.ids.extend(prompt)
            message.token_ids.SetInParent()
        else:
            raise TypeError("token ids need not be encoded")
    except (TypeError, ValueError, KeyError) as error:
        limit = "must be text, non-negative token ids, or messages of role and content"
        raise InvalidRequestError("prompt", prompt, limit) from error


class Generation:
    """What a request is to ask for next, and what it gave so far.

    A call that breaks is continued by another one: `request` then has the seed that the first was given and the tokens
    that came as prior output. Noise is keyed by seed and position, so the tokens are those of an unbroken request; the
    server replays prior tokens into its detokenizer, so the text of new deltas begins where the text before ended.

    Every delta must begin where the last one ended, and `Finished` must count as many tokens as came; whatever differs
    raises `StatusError` with code DATA_LOSS.

    Args:
        message: the request as the caller wants it.
    """

    def __init__(self, message: pb.GenerateRequest):
        self.started: pb.Started | None = None
        self.finished: pb.Finished | None = None
        #: Calls that this request took so far.
        self.num_calls = 0
        self._message = message
        self._prior = list(message.sampling.prior_output_token_ids)
        self._token_ids = list(self._prior)
        self._text = ""
        self._wants_logprobs = message.sampling.HasField("logprobs")
        self._logprobs: list[TokenLogprobs] = []
        self._request_id: str | None = None
        self._is_cancelled = False
        #: Of the present call: whether it told its beginning, and how many known tokens it has still to repeat.
        self._has_begun = False
        self._num_repeated = 0

    @property
    def has_ended(self) -> bool:
        """True when there is nothing more to come."""
        return self.finished is not None or self._is_cancelled

    def cancel(self) -> None:
        """Ends the request on the caller's wish; what came stays."""
        self._is_cancelled = True

    def next_request(self) -> pb.GenerateRequest:
        """The message of the next call; the first one, or one that goes on."""
        self.num_calls += 1
        self._has_begun, self._num_repeated = False, 0
        if self.num_calls == 1:
            return self._message
        message = pb.GenerateRequest()
        message.CopyFrom(self._message)
        if message.request_id:
            # The server that was lost may still hold the earlier name.
            suffix = f".{self.num_calls}"
            message.request_id = message.request_id[: MAX_ID_CHARS - len(suffix)] + suffix
        if self.started is not None:
            message.sampling.seed = self.started.seed
            message.arithmetic = self.started.arithmetic
        known = self._token_ids
        if len(known) >= message.sampling.max_tokens and len(known) > len(self._prior):
            # All tokens came, but not how they ended: the last one is asked for again, and the end comes with it.
            self._num_repeated = 1
        del message.sampling.prior_output_token_ids[:]
        message.sampling.prior_output_token_ids.extend(known[: len(known) - self._num_repeated])
        return message

    def take(self, event: pb.GenerateEvent) -> RequestDelta | None:
        """What an event adds; behind the last one, an empty delta with the finish reason.

        Raises:
            StatusError: DATA_LOSS.
        """
        kind = event.WhichOneof("event")
        if kind == "started":
            self._begin(event.started)
        elif kind == "delta":
            self._require(self._has_begun, "a delta came before the stream began")
            return self._append(event.delta)
        elif kind == "finished":
            self._require(self._has_begun, "the stream finished before it began")
            return self._finish(event.finished)
        return None

    @property
    def request_id(self) -> str | None:
        """The id that deltas and output carry; None before the server told it."""
        return self._request_id

    @property
    def output(self) -> RequestOutput:
        """The request as far as it got; finished if `finish_reason` is set.

        Its statistics of speculation, and cached tokens, are those of the call that finished.
        """
        given = self._message.token_ids.ids
        started, finished = self.started or pb.Started(), self.finished
        reason = FinishReason.ABORT if self._is_cancelled else None
        output = RequestOutput(
            request_id=self._request_id or self._message.request_id,
            prompt_token_ids=list(given or started.prompt_token_ids),
            token_ids=list(self._token_ids),
            text=self._text,
            finish_reason=reason,
            logprobs=list(self._logprobs) if self._wants_logprobs else None,
            seed=started.seed,
        )
        output.usage.prompt_tokens = started.prompt_tokens
        output.usage.completion_tokens = len(self._token_ids)
        if finished is not None:
            output.finish_reason = convert.finish_reason_from_proto(finished.finish_reason)
            output.matched_stop = convert.matched_stop_from_proto(finished)
            output.usage.cached_tokens = finished.usage.cached_tokens
            output.speculation = convert.speculation_from_proto(finished.speculation)
            if self._message.sampling.HasField("prompt_logprobs"):
                output.prompt_logprobs = [None, *convert.logprobs_from_proto(finished.prompt_logprobs)]
        return output

    def _begin(self, started: pb.Started) -> None:
        self._require(not self._has_begun, "the stream began twice")
        self._has_begun = True
        known = self.started
        if known is not None:
            for name in ("model", "seed", "prompt_tokens"):
                was, now = getattr(known, name), getattr(started, name)
                self._require(was == now, f"{name} is {now!r} in the stream that goes on, and was {was!r}")
            if not started.prompt_token_ids:
                started.prompt_token_ids.extend(known.prompt_token_ids)
        self.started = started
        self._request_id = self._request_id or started.request_id

    def _append(self, message: pb.Delta) -> RequestDelta | None:
        expected = len(self._token_ids) - self._num_repeated
        self._require(
            message.seq_offset == expected, f"a delta begins at token {message.seq_offset} and not at {expected}"
        )
        delta = convert.delta_from_proto(message, self._request_id or "", has_logprobs=self._wants_logprobs)
        if delta.logprobs is not None:
            num_tokens, num_logprobs = len(delta.token_ids), len(delta.logprobs)
            self._require(num_tokens == num_logprobs, f"{num_logprobs} log-probabilities came for {num_tokens} tokens")
        if self._num_repeated:
            is_known = delta.token_ids == self._token_ids[-self._num_repeated :]
            self._require(is_known, f"token {expected} differs from what came before")
            # Its text came before: a delta that reaches the limit holds nothing back.
            self._num_repeated = 0
            return None
        self._token_ids += delta.token_ids
        self._text += delta.text
        self._logprobs += delta.logprobs or ()
        return delta

    def _finish(self, finished: pb.Finished) -> RequestDelta:
        count, expected = finished.usage.completion_tokens, len(self._token_ids) - self._num_repeated
        self._require(count == expected, f"{expected} tokens came, and the server counts {count}")
        try:
            reason = convert.finish_reason_from_proto(finished.finish_reason)
        except ValueError as error:
            raise StatusError.data_loss(str(error)) from None
        self.finished = finished
        return RequestDelta(
            request_id=self._request_id or "",
            offset=len(self._token_ids),
            token_ids=[],
            text="",
            logprobs=[] if self._wants_logprobs else None,
            finish_reason=reason,
        )

    @staticmethod
    def _require(holds: bool, message: str) -> None:
        if not holds:
            raise StatusError.data_loss(message)
