"""The stock OpenAI client against a router before a real engine: its answers are the engine's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster import LLM, SamplingParams
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.types import SpeculationOptions
from support.router_stack import Stack, stack
from support.small_models import write_chat_template
from support.toy_cluster import cluster, run, until

openai = pytest.importorskip("openai")

PROMPT = "for i in range(3):"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
CHAT = "<system>be brief\n<user>hello\n<assistant>"


def client(made: Any) -> Any:
    port = made.router.http_port if isinstance(made, Stack) else made.routers[0].server.http_port
    return openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 11, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    "biased": {"temperature": 0.0, "logit_bias": {"65": 50.0}},
    "extras": {"temperature": 1.0, "seed": 3, "top_k": 20, "min_p": 0.02, "speculation": {"mode": "off"}},
}
#: What the client has no argument for.
EXTRAS = ("top_k", "min_p", "speculation", "ignore_eos")


def arguments(sampling: dict[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in sampling.items() if name in EXTRAS}
    return {name: value for name, value in sampling.items() if name not in EXTRAS} | {"extra_body": extra}


def params(sampling: dict[str, Any], **more: Any) -> SamplingParams:
    fields = dict(sampling)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    if "speculation" in fields:
        fields["speculation"] = SpeculationOptions(**fields["speculation"])
    return SamplingParams(**fields, **more)


def test_answers_are_those_of_the_engine(local: LLM, frontends: list[EngineFrontend], target: Path) -> None:
    chosen = [params(sampling, max_tokens=40, ignore_eos=True) for sampling in SAMPLING.values()]
    texts = local.generate([PROMPT] * len(chosen), chosen)
    chats = local.generate([CHAT] * len(chosen), chosen)

    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made, client(made) as api:
            for index, sampling in enumerate(SAMPLING.values()):
                options = arguments(sampling | {"ignore_eos": True}) | {"model": target.name, "max_tokens": 40}
                whole = await api.completions.create(prompt=PROMPT, **options)
                wanted = texts[index]
                assert (whole.choices[0].text, whole.choices[0].finish_reason) == (wanted.text, wanted.finish_reason)
                usage = whole.usage
                assert (usage.prompt_tokens, usage.completion_tokens) == (len(wanted.prompt_token_ids), 40)
                details = usage.completion_tokens_details
                stats = whole.jetflow["speculation"]
                # The first token comes from the prompt, each step gives one that was not guessed.
                accepted = details.accepted_prediction_tokens
                assert accepted == 39 - stats["num_steps"]
                assert details.rejected_prediction_tokens == stats["num_draft_nodes"] - accepted
                assert (stats["num_draft_nodes"] == 0) == (index == len(SAMPLING) - 1)
                whole = await api.chat.completions.create(messages=MESSAGES, **options)
                assert whole.choices[0].message.content == chats[index].text
                streamed = await api.chat.completions.create(
                    messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
                )
                chunks = [chunk async for chunk in streamed]
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                assert text == chats[index].text
                assert chunks[0].choices[0].delta.role == "assistant"
                assert chunks[-2].choices[0].finish_reason == "length"
                assert chunks[-1].usage.completion_tokens == 40 and not chunks[-1].choices
                assert all(chunk.usage is None for chunk in chunks[:-1])
                streamed = await api.completions.create(prompt=wanted.prompt_token_ids, stream=True, **options)
                chunks = [chunk async for chunk in streamed]
                assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text
            # The prompt is cached by now, as the usage tells.
            assert usage.prompt_tokens_details.cached_tokens > 0
            await made.is_idle()

    run(test, 240)


def test_stop_and_logprobs(local: LLM, frontends: list[EngineFrontend], target: Path) -> None:
    fixed = {"temperature": 0.0, "max_tokens": 30}
    plain = local.generate([CHAT], SamplingParams(ignore_eos=True, logprobs=3, **fixed))[0]
    stop = plain.text[8:10]
    stopped = local.generate([CHAT], SamplingParams(ignore_eos=True, stop=[stop], **fixed))[0]

    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made, client(made) as api:
            options = {"model": target.name, "messages": MESSAGES, **fixed}
            found = await api.chat.completions.create(
                logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True, "return_token_ids": True}, **options
            )
            choice = found.choices[0]
            assert choice.token_ids == plain.token_ids
            assert plain.logprobs is not None
            for told, wanted in zip(choice.logprobs.content, plain.logprobs, strict=True):
                assert told.logprob == pytest.approx(wanted.logprob)
                assert [top.logprob for top in told.top_logprobs] == pytest.approx([top[1] for top in wanted.top])
            found = await api.chat.completions.create(stop=stop, extra_body={"ignore_eos": True}, **options)
            assert (found.choices[0].message.content, found.choices[0].finish_reason) == (stopped.text, "stop")
            assert found.choices[0].stop_reason == stop
            text = await api.completions.create(
                model=target.name, prompt=PROMPT, logprobs=2, max_tokens=5, temperature=0.0
            )
            logprobs = text.choices[0].logprobs
            assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
            assert all(len(top) <= 2 for top in logprobs.top_logprobs)

    run(test, 240)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -1}, "temperature"),
    "type": ({"top_p": "all"}, "top_p"),
    "n": ({"n": 2}, "n"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "unknown": ({"temprature": 1}, "temprature"),
    "bias": ({"logit_bias": {"x": 1}}, "logit_bias[x]"),
    "seed": ({"seed": -4}, "seed"),
    "max-tokens": ({"max_tokens": 0}, "max_tokens"),
    "speculation": ({"speculation": {"mode": "always"}}, "speculation.mode"),
    "inner": ({"speculation": {"width": 3}}, "speculation.width"),
    "images": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    "no-messages": ({"messages": []}, "messages"),
    "top": ({"top_logprobs": 3}, "top_logprobs"),
    "stop": ({"stop": [1]}, "stop"),
    "huge": ({"max_tokens": 10**19}, "max_tokens"),
}


@pytest.mark.parametrize("changes, field", BAD.values(), ids=BAD)
def test_what_cannot_be_honoured_is_named(changes: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with cluster(1, http_port=0) as made, client(made) as api:
            body = {"model": "toy", "messages": MESSAGES} | changes
            with pytest.raises(openai.BadRequestError) as refused:
                await api.post("/chat/completions", body=body, cast_to=object)
            error = refused.value
            assert (error.param, error.type) == (field, "invalid_request_error")
            assert field in error.message

    run(test)


def test_errors_have_their_classes() -> None:
    async def test() -> None:
        async with cluster(1, http_port=0, replica={"step_s": 0.02}) as made, client(made) as api:
            with pytest.raises(openai.NotFoundError) as missing:
                await api.chat.completions.create(model="other", messages=MESSAGES)
            assert missing.value.code == "model_not_found"
            for method, path, status in [("get", "/chat/completions", 405), ("get", "/nothing", 404)]:
                with pytest.raises(openai.APIStatusError) as refused:
                    await getattr(api, method)(path, cast_to=object)
                assert refused.value.status_code == status and refused.value.type == "invalid_request_error"
            with pytest.raises(openai.APIStatusError) as late:
                await api.completions.create(model="toy", prompt=[1], max_tokens=500, extra_body={"timeout_ms": 60})
            assert late.value.status_code == 504
            # Behind the first chunk there is no status any more, and the error is the last event.
            streamed = await api.completions.create(
                model="toy", prompt=[1], max_tokens=500, stream=True, extra_body={"timeout_ms": 200}
            )
            with pytest.raises(openai.APIError, match="deadline"):
                async for _ in streamed:
                    pass
            assert [model.id async for model in api.models.list()] == ["toy"]
            assert (await api.models.retrieve("toy")).max_model_len == 4096
            await made.is_clean()

    run(test)


def test_a_model_without_a_template_refuses_chats(frontends: list[EngineFrontend], target: Path) -> None:
    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made, client(made) as api:
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                await api.chat.completions.create(model=target.name, messages=MESSAGES)

    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    frontends[0]._chat_tokenizer = None
    try:
        run(test)
    finally:
        write_chat_template(target)
        frontends[0]._chat_tokenizer = None


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_pages(is_stream: bool, frontends: list[EngineFrontend], target: Path) -> None:
    async def test() -> None:
        async with stack(frontends, target, http_port=0) as made:
            async with client(made) as api:
                call = asyncio.create_task(
                    api.completions.create(
                        model=target.name,
                        prompt=PROMPT,
                        max_tokens=480,
                        stream=is_stream,
                        extra_body={"ignore_eos": True, "speculation": {"mode": "off"}},
                    )
                )
                await until(lambda: frontends[0].engine.has_work)
                if is_stream:
                    await (await call).close()
                else:
                    call.cancel()
            await until(lambda: made.router.num_running == 0)
            await made.is_idle()
            assert frontends[0].engine.stats().num_generated_tokens % 480, "it ended before its length"

    run(test, 240)
