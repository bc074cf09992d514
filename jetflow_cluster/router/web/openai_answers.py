"""From events of a stream to the objects of the OpenAI API. Pure: what goes out is decided here, and sent elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jetflow_cluster.router.web.openai_requests import ApiRequest
from jetflow_cluster.rpc.trees import source_of
from jetflow_cluster.rpc.v1 import inference_pb2 as pb

#: Of a finish.
REASONS: dict[int, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}
#: The text of one token, special ones too.
TokenText = Callable[[int], str]


class Answer:
    """One request's answer, as chunks of a stream or as a whole.

    Args:
        request: what was asked for.
        token_text: names tokens in log-probabilities.
    """

    def __init__(self, request: ApiRequest, token_text: TokenText):
        self._request, self._token_text = request, token_text
        self._is_chat = request.kind == "chat"
        self._created = int(time.time())
        self._started = pb.Started()
        self._finished = pb.Finished()
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[pb.TokenLogprobs] = []
        self._num_chars = 0

    def chunks(self, event: pb.GenerateEvent) -> list[dict[str, Any]]:
        """What a stream tells of an event."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
            # A chat's first chunk names the speaker; a completion has nothing to say yet.
            return [self._chunk({"role": "assistant", "content": ""})] if self._is_chat else []
        if kind == "delta":
            delta = event.delta
            logprobs = self._logprobs_of(delta.logprobs)
            self._num_chars += len(delta.text)
            return [self._chunk({"content": delta.text}, text=delta.text, logprobs=logprobs, delta=delta)]
        self._finished = event.finished
        last = self._chunk({}, reason=REASONS[self._finished.finish_reason])
        last["jetflow"] = self._extras()
        if not self._request.has_usage:
            return [last]
        return [last, self._head("chunk") | {"choices": [], "usage": usage_of(self._finished)}]

    def add(self, event: pb.GenerateEvent) -> None:
        """Gathers an event for `whole`."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
        elif kind == "delta":
            self._text.append(event.delta.text)
            self._token_ids.extend(event.delta.token_ids)
            self._logprobs.extend(event.delta.logprobs)
        else:
            self._finished = event.finished

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, behind the last event."""
        text = "".join(self._text)
        choice: dict[str, Any] = {"index": 0, "finish_reason": REASONS[self._finished.finish_reason]}
        choice["logprobs"] = self._logprobs_of(self._logprobs)
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        if self._finished.HasField("matched_stop_string") or self._finished.HasField("matched_stop_token_id"):
            choice["stop_reason"] = self._stop_reason()
        if self._request.has_token_ids:
            choice["token_ids"] = self._token_ids
        whole = self._head("") | {"choices": [choice], "usage": usage_of(self._finished)}
        return whole | {"jetflow": self._extras()}

    def _head(self, suffix: str) -> dict[str, Any]:
        name = "text_completion"
        if self._is_chat:
            name = "chat.completion.chunk" if suffix else "chat.completion"
        return {
            "id": self._started.request_id,
            "object": name,
            "created": self._created,
            "model": self._started.model,
        }

    def _chunk(
        self,
        content: dict[str, str],
        *,
        text: str = "",
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        delta: pb.Delta | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": logprobs}
        choice |= {"delta": content} if self._is_chat else {"text": text}
        if reason is not None:
            choice["stop_reason"] = self._stop_reason()
        if self._request.has_token_ids and delta is not None:
            choice["token_ids"] = list(delta.token_ids)
        chunk = self._head("chunk") | {"choices": [choice]}
        if self._request.has_usage:
            chunk["usage"] = None
        if self._request.has_trees and delta is not None:
            chunk["jetflow"] = self._step_of(delta)
        return chunk

    def _step_of(self, delta: pb.Delta) -> dict[str, Any]:
        """What a step gave, token by token, and what it guessed."""
        step: dict[str, Any] = {"num_accepted": delta.num_accepted, "token_ids": list(delta.token_ids)}
        step["token_texts"] = [self._token_text(token) for token in delta.token_ids]
        step["tree"] = self._tree_of(delta.tree) if delta.HasField("tree") else None
        return step

    def _tree_of(self, tree: pb.DraftTree) -> dict[str, Any]:
        return {
            "token_ids": list(tree.token_ids),
            "token_texts": [self._token_text(token) for token in tree.token_ids],
            "parents": list(tree.parents),
            "path_logprobs": list(tree.path_logprobs),
            "sources": [source_of(number).value for number in tree.sources],
            "accepted_nodes": list(tree.accepted_nodes),
        }

    def _stop_reason(self) -> str | int | None:
        which = self._finished.WhichOneof("matched_stop")
        return None if which is None else getattr(self._finished, which)

    def _logprobs_of(self, entries: Sequence[pb.TokenLogprobs]) -> dict[str, Any] | None:
        if self._request.num_logprobs is None:
            return None
        if self._is_chat:
            return {"content": [self._chat_logprob(entry) for entry in entries], "refusal": None}
        return self._completion_logprobs(entries)

    def _chat_logprob(self, entry: pb.TokenLogprobs) -> dict[str, Any]:
        top = [self._named(other.token_id, other.logprob) for other in entry.top]
        return self._named(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        # A token that is a part of a character has bytes that its text does not show.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}

    def _completion_logprobs(self, entries: Iterable[pb.TokenLogprobs]) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._num_chars
        for entry in entries:
            text = self._token_text(entry.token_id)
            found["tokens"].append(text)
            found["token_logprobs"].append(entry.logprob)
            found["top_logprobs"].append({self._token_text(other.token_id): other.logprob for other in entry.top})
            found["text_offset"].append(offset)
            offset += len(text)
        return found

    def _extras(self) -> dict[str, Any]:
        """What this server can tell and the API has no place for."""
        finished, stats = self._finished, self._finished.speculation
        return {
            "seed": self._started.seed,
            "replica_id": self._started.replica_id,
            "num_resumes": finished.num_resumes,
            "speculation": {
                "num_steps": stats.num_spec_steps,
                "num_draft_nodes": stats.num_draft_nodes,
                "num_accepted_tokens": stats.num_accepted_draft_tokens,
                "mean_acceptance_length": stats.mean_acceptance_length,
                "acceptance_histogram": list(stats.acceptance_histogram),
            },
            "timing": {
                "queue_s": finished.timing.queue_s,
                "time_to_first_token_s": finished.timing.time_to_first_token_s,
                "total_s": finished.timing.total_s,
            },
        }


def usage_of(finished: pb.Finished) -> dict[str, Any]:
    """Token counts. A rejected prediction is a node of a tree that was checked and not kept."""
    usage, stats = finished.usage, finished.speculation
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": stats.num_accepted_draft_tokens,
            "rejected_prediction_tokens": max(0, stats.num_draft_nodes - stats.num_accepted_draft_tokens),
        },
    }


def model_of(card: pb.ModelCard, created: int) -> dict[str, Any]:
    """An entry of the list of models."""
    return {
        "id": card.model,
        "object": "model",
        "created": created,
        "owned_by": "jetflow",
        "max_model_len": card.max_model_len,
        "has_chat_template": card.has_chat_template,
        "has_draft_head": card.has_draft_head,
    }
