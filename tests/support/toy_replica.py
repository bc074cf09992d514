"""A replica's data plane around a toy model, with faults on demand. Its tokens are a function of prompt, seed and
position, so a router that resumes a request must show the same; its text comes from the engine's own detokenizer."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jetflow_cluster.engine.detokenizer import IncrementalDetokenizer
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.rpc.v1 import replica_pb2_grpc

MODEL = "toy"
MAX_MODEL_LEN = 4096
#: Characters of one to four bytes, so that tokens cut them.
_CHARACTERS = "ab c.é€😀"


@cache
def tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def save_tokenizer(folder: Path) -> Path:
    """Writes ``tokenizer.json``."""
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def toy_text(prompt: Sequence[int], seed: int, num_characters: int) -> str:
    """What the toy model would say."""
    key = f"{list(prompt)}/{seed}".encode()
    return "".join(
        _CHARACTERS[hashlib.blake2b(key + index.to_bytes(4, "big"), digest_size=1).digest()[0] % len(_CHARACTERS)]
        for index in range(num_characters)
    )


def toy_tokens(prompt: Sequence[int], seed: int, count: int) -> list[int]:
    """The first tokens of the output of the toy model."""
    return list(tokenizer().encode(toy_text(prompt, seed, count)).ids[:count])


@dataclass
class Expected:
    """What a whole request gives."""

    token_ids: list[int]
    text: str
    finish_reason: int
    stop: str = ""


def expected(prompt: Sequence[int], seed: int, max_tokens: int, stop: Sequence[str] = ()) -> Expected:
    """The output of an unbroken request."""
    tokens = toy_tokens(prompt, seed, max_tokens)
    detokenizer = IncrementalDetokenizer(tokenizer(), prompt, stop)
    pushed = detokenizer.push(tokens)
    if pushed.stop_index is not None:
        kept = tokens[: pushed.stop_index + 1]
        return Expected(kept, pushed.text, pb.FINISH_REASON_STOP, pushed.stop_string or "")
    return Expected(tokens, pushed.text + detokenizer.flush(), pb.FINISH_REASON_LENGTH)


@dataclass
class Fault:
    """What happens to a request behind so many new tokens."""

    #: break, freeze, draining, internal, flush (internal, behind the text that was held back), gap, repeat, lose (what
    #: remains of the last tokens, and the end), invalid.
    kind: str
    after: int = 0


@dataclass
class ToyReplica:
    """A `JetFlowReplica` service. Belongs to the event loop that it was started in."""

    replica_id: str
    step_s: float = 0.0
    heartbeat_s: float = 0.05
    healthy: bool = True
    draining: bool = False
    model: str = MODEL
    #: What its card says that it computes in.
    arithmetic: str = "float32"
    #: For the next requests, in order.
    faults: deque[Fault | None] = field(default_factory=deque)
    submits: list[rpb.Submit] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    #: Ids of requests that run now.
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    hellos: list[rpb.Hello] = field(default_factory=list)
    frozen: bool = False
    outstanding_tokens: int = 0
    address: str = ""
    port: int = 0

    async def start(self) -> ToyReplica:
        """Listens; a second time on the port of the first."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        replica_pb2_grpc.add_JetFlowReplicaServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.address = f"127.0.0.1:{self.port}"
        self._streams: set[_Stream] = set()
        await self._server.start()
        return self

    async def stop(self) -> None:
        """Ends all at once, as if it were killed."""
        await self._server.stop(None)

    def break_streams(self) -> None:
        """Ends the connections of all routers."""
        for stream in list(self._streams):
            stream.out.put_nowait(None)

    async def Attach(self, frames: Any, context: Any) -> Any:
        stream = _Stream(self)
        self._streams.add(stream)
        reader = asyncio.create_task(stream.read(frames))
        heart = asyncio.create_task(stream.beat())
        try:
            while (frame := await stream.out.get()) is not None:
                if not self.frozen:
                    yield frame
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
        finally:
            self._streams.discard(stream)
            for task in (reader, heart, *stream.tasks.values()):
                task.cancel()

    async def Encode(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        text = request.text or "".join(f"<{m.role}>{m.content}" for m in request.chat.messages)
        return pb.TokenizeResponse(token_ids=tokenizer().encode(text).ids)

    async def Describe(self, request: pb.GetModelCardRequest, context: Any) -> pb.ModelCard:
        return pb.ModelCard(
            model=self.model,
            vocab_size=256,
            max_model_len=MAX_MODEL_LEN,
            has_chat_template=True,
            arithmetic=self.arithmetic,
        )

    def load(self) -> pb.ReplicaLoad:
        """As heartbeats tell it."""
        return pb.ReplicaLoad(
            replica_id=self.replica_id,
            healthy=self.healthy,
            draining=self.draining,
            num_running=len(self.running),
            outstanding_tokens=self.outstanding_tokens,
        )


class _Stream:
    """One router's stream."""

    def __init__(self, replica: ToyReplica):
        self.replica = replica
        self.out: asyncio.Queue[rpb.ReplicaFrame | None] = asyncio.Queue()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def beat(self) -> None:
        while True:
            self.out.put_nowait(rpb.ReplicaFrame(load=self.replica.load()))
            await asyncio.sleep(self.replica.heartbeat_s)

    async def read(self, frames: Any) -> None:
        replica = self.replica
        async for frame in frames:
            if frame.HasField("hello"):
                replica.hellos.append(frame.hello)
            for submit in frame.submits:
                replica.submits.append(submit)
                fault = replica.faults.popleft() if replica.faults else None
                task = asyncio.create_task(self.generate(submit, fault))
                self.tasks[submit.request_id] = replica.running[submit.request_id] = task
                task.add_done_callback(lambda _, name=submit.request_id: replica.running.pop(name, None))
            for abort in frame.aborts:
                replica.aborts.append(abort.request_id)
                if task := replica.running.get(abort.request_id):
                    task.cancel("abort")

    def send(self, request_id: str, **event: Any) -> None:
        self.out.put_nowait(rpb.ReplicaFrame(events=[rpb.ReplicaEvent(request_id=request_id, **event)]))

    async def generate(self, submit: rpb.Submit, fault: Fault | None) -> None:
        run = _Run(submit)
        name = submit.request_id
        self.send(name, started=pb.Started(replica_id=self.replica.replica_id, model=MODEL))
        try:
            for delta in run.deltas():
                if fault is not None and run.num_new > fault.after and await self.fail(fault, run, delta):
                    return
                if fault is not None and fault.kind == "lose" and run.num_output >= submit.sampling.max_tokens:
                    self.send(name, delta=delta)
                    self.out.put_nowait(None)
                    await asyncio.Event().wait()
                self.send(name, delta=delta)
                await asyncio.sleep(self.replica.step_s)
            self.send(name, finished=run.finished())
        except asyncio.CancelledError:
            if text := run.detokenizer.flush():
                self.send(name, delta=pb.Delta(seq_offset=run.num_told, text=text))
            self.send(name, finished=run.finished(pb.FINISH_REASON_ABORT))
            raise
        finally:
            self.tasks.pop(name, None)

    async def fail(self, fault: Fault, run: _Run, delta: pb.Delta) -> bool:
        """True when the request was refused, and is over here."""
        name = run.submit.request_id
        if fault.kind == "break":
            self.out.put_nowait(None)
        elif fault.kind == "freeze":
            self.replica.frozen = True
        elif fault.kind == "gap":
            self.send(name, delta=pb.Delta(seq_offset=delta.seq_offset + 1, token_ids=delta.token_ids))
        elif fault.kind == "repeat":
            self.send(name, delta=pb.Delta(seq_offset=abs(delta.seq_offset - 1), token_ids=delta.token_ids))
        elif fault.kind != "lose":
            codes = {"draining": rpb.REFUSAL_CODE_DRAINING, "invalid": rpb.REFUSAL_CODE_INVALID}
            code = codes.get(fault.kind, rpb.REFUSAL_CODE_INTERNAL)
            if fault.kind == "flush":
                self.send(name, delta=pb.Delta(seq_offset=delta.seq_offset, text="held back"))
            refused = rpb.Refused(request_id=name, code=code, field="prompt", value="7 tokens", limit="at most 6")
            self.send(name, refused=refused)
            return True
        if fault.kind != "lose":
            await asyncio.Event().wait()
        return False


class _Run:
    """The toy model on one request."""

    def __init__(self, submit: rpb.Submit):
        self.submit, sampling = submit, submit.sampling
        prior = list(sampling.prior_output_token_ids)
        self.tokens = toy_tokens(submit.token_ids, sampling.seed, sampling.max_tokens)
        assert prior == self.tokens[: len(prior)], "the prior tokens are not those of the model"
        self.detokenizer = IncrementalDetokenizer(tokenizer(), submit.token_ids, list(sampling.stop))
        self.detokenizer.push(prior)
        self.num_prior = self.num_output = self.num_told = len(prior)
        self.num_new = 0
        self.stop = ""
        self.accepted: list[int] = []

    def deltas(self) -> Iterator[pb.Delta]:
        """One, two and three tokens by turns, from the beginning of the whole output."""
        while self.num_output < len(self.tokens) and not self.stop:
            first = self.num_output
            ids = self.tokens[first : first + 1 + first % 3]
            pushed = self.detokenizer.push(ids)
            if pushed.stop_index is not None:
                ids, self.stop = ids[: pushed.stop_index + 1], pushed.stop_string or ""
            self.num_output += len(ids)
            self.num_new += len(ids)
            text = pushed.text
            if self.num_output == len(self.tokens) and not self.stop:
                text += self.detokenizer.flush()
            if first > self.num_prior:
                self.accepted.append(len(ids) - 1)
            logprobs = [pb.TokenLogprobs(token_id=i, logprob=-i / 8) for i in ids]
            self.num_told = self.num_output
            yield pb.Delta(
                seq_offset=first,
                token_ids=ids,
                text=text,
                num_accepted=len(ids) - 1,
                logprobs=logprobs if self.submit.sampling.HasField("logprobs") else (),
            )

    def finished(self, reason: int | None = None) -> pb.Finished:
        if reason is None:
            reason = pb.FINISH_REASON_STOP if self.stop else pb.FINISH_REASON_LENGTH
        stats = pb.SpeculationStats(num_spec_steps=len(self.accepted), num_accepted_draft_tokens=sum(self.accepted))
        stats.num_draft_nodes = 4 * len(self.accepted)
        stats.acceptance_histogram.extend(self.accepted.count(i) for i in range(3))
        usage = pb.Usage(prompt_tokens=len(self.submit.token_ids), completion_tokens=self.num_told, cached_tokens=2)
        return pb.Finished(
            finish_reason=reason,  # type: ignore[arg-type]
            usage=usage,
            speculation=stats,
            matched_stop_string=self.stop or None,
        )
