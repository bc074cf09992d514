"""What a client gets is whole, whatever replicas do."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from jetflow_cluster.router.attempts import Attempts
from jetflow_cluster.router.delivery import Delivery, ReplicaFaultError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb


def delivery(prior: tuple[int, ...] = (), max_tokens: int = 6, **sampling: Any) -> Delivery:
    params = pb.SamplingParams(max_tokens=max_tokens, prior_output_token_ids=prior, **sampling)
    made = Delivery(pb.GenerateRequest(sampling=params), [1, 2, 3], 77)
    made.submit("first", timeout_s=None, max_model_len=0)
    made.has_begun = True
    return made


def delta(offset: int, *tokens: int, text: str = "", accepted: int = 0) -> pb.Delta:
    return pb.Delta(seq_offset=offset, token_ids=tokens, text=text, num_accepted=accepted)


def resume(made: Delivery, max_model_len: int = 0) -> list[int]:
    """What another replica gets as prior output."""
    made.lost()
    submit = made.submit("next", timeout_s=1.5, max_model_len=max_model_len)
    assert (submit.sampling.seed, submit.timeout_ms, submit.request_id) == (77, 1500, "next")
    return list(submit.sampling.prior_output_token_ids)


def finished(count: int, **stats: Any) -> pb.Finished:
    usage = pb.Usage(completion_tokens=count)
    return pb.Finished(usage=usage, speculation=pb.SpeculationStats(**stats), finish_reason=pb.FINISH_REASON_LENGTH)


def test_a_resume_goes_on_behind_prior_and_delivered_tokens() -> None:
    made = delivery(prior=(9, 8))
    assert made.take(delta(2, 7, 6)) is not None
    assert resume(made) == [9, 8, 7, 6]
    assert made.take(delta(4, 5)) is not None
    assert resume(made) == [9, 8, 7, 6, 5]
    assert (made.num_output, made.num_delivered, made.num_resumes) == (5, 3, 2)


def test_nothing_delivered_is_no_prior_output() -> None:
    assert resume(delivery(prior=(9, 8))) == [9, 8]
    assert resume(delivery()) == []


@pytest.mark.parametrize("offset", [0, 1, 3, 9])
def test_a_delta_in_the_wrong_place_is_a_fault(offset: int) -> None:
    made = delivery()
    made.take(delta(0, 5, 6))
    with pytest.raises(ReplicaFaultError):
        made.take(delta(offset, 7))
    assert made.num_output == 2


def test_missing_logprobs_and_wrong_counts_are_faults() -> None:
    made = delivery(logprobs=0)
    with pytest.raises(ReplicaFaultError):
        made.take(delta(0, 5))
    with pytest.raises(ReplicaFaultError):
        delivery().finish(finished(1))


@pytest.mark.parametrize("limit", ["max_tokens", "max_model_len"])
def test_when_only_the_end_is_missing_the_last_token_is_asked_for_again(limit: str) -> None:
    made = delivery(max_tokens=3 if limit == "max_tokens" else 10)
    max_model_len = 0 if limit == "max_tokens" else 6
    made.take(delta(0, 5, 6, 7, text="abc"))
    assert resume(made, max_model_len) == [5, 6]
    with pytest.raises(ReplicaFaultError):
        made.take(delta(2, 8))
    assert resume(made, max_model_len) == [5, 6]
    assert made.take(delta(2, 7, text="c")) is None
    (last,) = made.finish(finished(3))
    assert last.finished.usage.completion_tokens == 3
    assert made.num_output == 3


def test_an_abort_while_a_token_is_repeated_counts_it() -> None:
    made = delivery(max_tokens=3)
    made.take(delta(0, 5, 6, 7, text="abc"))
    resume(made)
    assert made.take(delta(2, text="told before")) is None
    (last,) = made.finish(finished(2))
    assert last.finished.usage.completion_tokens == 3


def test_text_without_tokens_comes_at_the_end_or_not_at_all() -> None:
    made = delivery()
    made.take(delta(0, 5, text="a"))
    assert made.take(delta(1, text="b")) is None
    text, last = made.finish(finished(1))
    assert (text.delta.text, text.delta.seq_offset) == ("b", 1) and last.HasField("finished")

    made = delivery()
    made.take(delta(0, 5, text="a"))
    assert made.take(delta(1, text="flushed by a replica that fails")) is None
    resume(made)
    told = made.take(delta(1, 6, text="b"))
    assert told is not None and told.text == "b"
    assert len(made.finish(finished(2))) == 1


def test_statistics_of_all_replicas_are_summed() -> None:
    made = delivery(max_tokens=20)
    for offset, accepted in ((0, 0), (1, 2), (4, 0), (5, 1)):
        made.take(delta(offset, *range(accepted + 1), accepted=accepted))
    resume(made)
    made.take(delta(7, 1))
    made.take(delta(8, 1, 2, accepted=1))
    end = finished(10, num_spec_steps=1, num_draft_nodes=8, num_accepted_draft_tokens=1, acceptance_histogram=[0, 1])
    stats = made.finish(end)[0].finished.speculation
    assert (stats.num_spec_steps, stats.num_accepted_draft_tokens, stats.num_draft_nodes) == (4, 4, 11)
    assert list(stats.acceptance_histogram) == [1, 2, 1]
    assert stats.mean_acceptance_length == 2.0


def test_an_abort_without_a_last_word_says_what_is_known() -> None:
    made = delivery(prior=(9,))
    made.take(delta(1, 5, text="a"))
    made.take(delta(2, 6, 7, text="b", accepted=1))
    (last,) = made.aborted()
    assert last.finished.finish_reason == pb.FINISH_REASON_ABORT
    assert (last.finished.usage.prompt_tokens, last.finished.usage.completion_tokens) == (3, 4)
    assert last.finished.speculation.num_accepted_draft_tokens == 1


def attempts(*outputs: int, is_internal: bool = False, max_fruitless: int = 3) -> Attempts:
    """Replicas that failed, with so many output tokens behind each."""
    made, before = Attempts(max_fruitless), 0
    for output in outputs:
        made.began(before)
        made.failed(output, is_internal=is_internal)
        before = output
    return made


@pytest.mark.parametrize(
    "outputs, are_enough, pause_s",
    [
        pytest.param((0,), False, 0.0, id="first"),
        pytest.param((5,), False, 0.0, id="first-behind-tokens"),
        pytest.param((0, 0, 0), False, 0.1, id="at-the-limit"),
        pytest.param((0, 0, 0, 0), True, 0.2, id="beyond"),
        pytest.param((0, 0, 0, 1), False, 0.0, id="a-token-is-hope"),
        pytest.param((1, 2, 3, 4, 5, 6, 7), False, 0.0, id="always-a-token"),
        pytest.param((1, 1, 1, 1), True, 0.2, id="none-behind-the-first"),
    ],
)
def test_attempts_end_when_they_bear_no_fruit(outputs: tuple[int, ...], are_enough: bool, pause_s: float) -> None:
    made = attempts(*outputs)
    assert (made.are_enough, made.pause_s) == (are_enough, pytest.approx(pause_s))


def test_what_a_request_fails_with() -> None:
    assert attempts(0).failure(0, 4).code is grpc.StatusCode.UNAVAILABLE
    assert attempts(0, is_internal=True).failure(0, 4).code is grpc.StatusCode.INTERNAL
    error = attempts(0, is_internal=True).failure(2, 4)
    assert (error.code, error.last_offset) == (grpc.StatusCode.ABORTED, 4)
