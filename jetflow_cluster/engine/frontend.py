"""What `LLM` and `AsyncLLM` share: loading, validation, and the making of requests."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.budget import BudgetTable
from jetflow_cluster.engine.cost_store import CostStore
from jetflow_cluster.engine.detokenizer import IncrementalDetokenizer
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.loading import DrafterFactory, LoadedEngine, load_engine
from jetflow_cluster.engine.memory_plan import MemoryPlan
from jetflow_cluster.engine.protocols import TreeBuilder
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.warmup import warm_up
from jetflow_cluster.layers.compute_threads import release_compute_threads
from jetflow_cluster.models.hub import checkpoints
from jetflow_cluster.models.weights import weights_digest
from jetflow_cluster.parallel.channel import LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.types import InvalidRequestError, SamplingParams, SpeculationMode
from jetflow_kernels import compilations

#: Text, or token ids.
Prompt = str | Sequence[int]

_WARMUP_TEXTS = (
    "def read_lines(path, encoding='utf-8'):\n    with open(path, encoding=encoding) as file:\n        return [",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
    "The following function returns the number of items in the list. If the list is empty, it returns",
    "import os\nimport sys\n\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n    for",
)


class EngineFrontend:
    """An engine with the checks and conversions that every request passes."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        tree_nodes: Mapping[int, int] | None,
        drafter_factory: DrafterFactory | None = None,
        tree_builder: TreeBuilder | None = None,
        tp: TpGroup | None = None,
        channel: LeaderChannel | None = None,
        is_drafter_ready: bool = True,
        on_phase: Callable[[str], None] | None = None,
    ):
        self._on_phase = on_phase or (lambda name: None)
        self._on_phase("weights")
        #: Guesses come from the configured head, and trees are the exact ones; a head elsewhere is not ready yet.
        self._has_own_trees = tree_builder is None and (drafter_factory is None or not is_drafter_ready)
        compilations.watch()
        compilations.mark_loading()
        loaded = load_engine(
            config,
            tp=tp,
            channel=channel,
            drafter_factory=drafter_factory,
            tree_builder=tree_builder,
        )
        self.config = config
        self.engine: Engine = loaded.engine
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.max_model_len = loaded.max_model_len
        self.target_dir: Path = loaded.target_dir
        #: What this rank holds on its device.
        self.memory: MemoryPlan = loaded.memory
        self._loaded: LoadedEngine = loaded
        self._arrivals = itertools.count()
        self._chat_tokenizer: Any = None
        if tree_nodes is not None:
            self.engine.scheduler.budget = BudgetTable(tree_nodes)
        elif self.engine.drafter is not None and is_drafter_ready:
            self.warm_up()
        compilations.mark_ready()
        # Often another thread steps the engine.
        release_compute_threads()

    @property
    def vocab_size(self) -> int:
        """Ids that the target knows."""
        return self.engine.target.model.config.vocab_size

    def make_request(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Request:
        """A checked request. Prior output tokens are replayed; they may end it.

        Raises:
            InvalidRequestError: naming the field, the value and the limit.
        """
        token_ids = self.encode(prompt)
        self._check(token_ids, params)
        engine, page_size = self.engine, self.config.page_size
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(self.tokenizer, token_ids, params.stop)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            arrival=next(self._arrivals),
            pages=PageTable(engine.pool, page_size),
            keys=PageKeys(page_size),
            detokenizer=detokenizer,
            eos_token_ids=self._loaded.eos_token_ids,
            max_len=self.max_model_len,
        )
        prior = list(params.prior_output_token_ids)
        if prior:
            num_kept = len(request.append(prior).token_ids)
            if num_kept < len(prior):
                limit = f"must not go on behind token {num_kept - 1}, which ends the output"
                raise InvalidRequestError("prior_output_token_ids", f"{len(prior)} tokens", limit)
        return request

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidRequestError: text without a tokenizer or with halves of characters, or ids that are no ids of the
                vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("prompt", prompt[:40], "text needs a tokenizer.json; give token ids")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                limit = f"must be text that UTF-8 can hold; character {error.start} is a lone surrogate"
                raise InvalidRequestError("prompt", prompt[:40], limit) from None
            return list(self.tokenizer.encode(prompt).ids)
        token_ids = list(prompt)
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise InvalidRequestError("prompt", token, f"token ids are integers in [0, {self.vocab_size - 1}]")
        return token_ids

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, by the checkpoint's chat template, with the answer's opening.

        Raises:
            InvalidRequestError: the checkpoint has no chat template.
        """
        if self._chat_tokenizer is None:
            from transformers import AutoTokenizer

            self._chat_tokenizer = AutoTokenizer.from_pretrained(str(self.target_dir))
        if not self._chat_tokenizer.chat_template:
            raise InvalidRequestError("messages", f"{len(messages)} messages", "the model has no chat template")
        encoded = self._chat_tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(encoded)

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequestError("prompt", token_ids, "must have at least one token")
        if len(token_ids) >= self.max_model_len:
            limit = f"must be at most {self.max_model_len - 1} (max_model_len - 1)"
            raise InvalidRequestError("prompt", f"{len(token_ids)} tokens", limit)
        num_known = len(token_ids) + len(params.prior_output_token_ids)
        if num_known > self.max_model_len:
            limit = f"must be at most {self.max_model_len} (max_model_len) with prior output"
            raise InvalidRequestError("prompt", f"{num_known} tokens", limit)
        longest = min(len(token_ids) + params.max_tokens, self.max_model_len)
        pool = self.engine.pool
        if -(-longest // self.config.page_size) > pool.num_pages:
            raise InvalidRequestError(
                "max_tokens",
                params.max_tokens,
                f"{longest} tokens do not fit {pool.num_pages} pages of {self.config.page_size} slots",
            )
        ids = {"logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        for name, tokens in (ids | {"prior_output_token_ids": params.prior_output_token_ids}).items():
            for token in tokens:
                if token >= self.vocab_size:
                    raise InvalidRequestError(name, token, f"the vocabulary has {self.vocab_size} tokens")
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop", params.stop, "stop strings need a tokenizer.json")
        if params.speculation.mode is SpeculationMode.FORCE and self.engine.drafter is None:
            raise InvalidRequestError("speculation.mode", "force", "the engine has no draft head")

    def warm_up(self) -> None:
        """Measures the tree sizes of mode ``auto``; where draft workers must come in first, once they are there."""
        config = self.config
        self._on_phase("kernels")
        store = self.cost_store()
        self._on_phase("checking costs" if store.is_filled else "measuring")
        prompts = [self.encode(text) if self.tokenizer else [] for text in _WARMUP_TEXTS]
        room = max(1, min(64, self.max_model_len // 4, self.engine.pool.num_pages * config.page_size // 4))
        prompts = [(p or [(7 * i + 3) % self.vocab_size for i in range(32)])[:room] for p in prompts]
        self.engine.scheduler.budget = warm_up(
            self.engine,
            self.make_warmup_request,
            prompts,
            max_running=config.max_num_requests,
            max_rows=config.max_num_batched_tokens,
            max_len=self.max_model_len,
            store=store,
        )
        release_compute_threads()

    def cost_store(self) -> CostStore:
        """Where the measured costs of this engine's steps are kept."""
        target, drafter, config = self.engine.target, self.engine.drafter, self.config
        described = (target.model.config, str(target.model.dtype), type(drafter).__name__, config.draft_dtype)
        head = getattr(drafter, "config", None)
        return CostStore(
            target.device,
            (*described, head),
            weights=self._yields_depend_on(),
            tensor_parallel_size=config.tensor_parallel_size,
        )

    def _yields_depend_on(self) -> object:
        """What decides what trees yield, beside what costs depend on; None where that is to be measured every time."""
        # On a GPU these steps also launch kernels for the first time.
        if self.engine.target.device.type != "cpu" or not self._has_own_trees:
            return None
        folders = [folder for folder in checkpoints(self.config) if folder is not None]
        return weights_digest(*folders), self.engine.lookup is not None

    def make_warmup_request(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request outside the limits on `max_tokens`; it is aborted or ends by the context's limit, or by the pool's:
        one that never fits would be preempted without end."""
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=params,
            seed=0,
            arrival=next(self._arrivals),
            pages=PageTable(self.engine.pool, self.config.page_size),
            keys=PageKeys(self.config.page_size),
            detokenizer=None,
            eos_token_ids=self._loaded.eos_token_ids,
            max_len=min(self.max_model_len, self.engine.pool.num_pages * self.config.page_size),
        )
