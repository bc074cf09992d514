"""What the host writes before a step on static buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jetflow_cluster.engine.device_acceptance import walk_sampling
from jetflow_cluster.engine.protocols import StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.static_parts import StaticPart, write_guesses
from jetflow_cluster.engine.static_step import StaticStep
from jetflow_cluster.layers.walk_table import changed_tokens, walk_factors
from jetflow_cluster.tree.noise import as_signed

#: Inputs with an entry per request in every bucket.
_COLUMNS = ("anchor_ids", "context_lens", "limits", "has_context", "numbers", "factors", "page_table")
#: Arrival and life of the request that a row holds, and how many of its pages.
_NOBODY = (-1, 0, 0)


class StaticInputs:
    """The host's tensors of one `StaticStep`. What does not change while a row holds the same request is written once.

    Args:
        step: whose inputs are written, and which nobody else writes.
        scratch_page: stands where a request has no page.
    """

    def __init__(self, step: StaticStep, scratch_page: int):
        self._step, self._scratch_page = step, scratch_page
        self._host = {name: tensor.numpy() for name, tensor in step.inputs.host.items()}
        self._host["page_table"][:] = scratch_page
        self._held = [_NOBODY] * step.bucket.num_requests
        self._num_rows = 0

    def write(
        self, plan: StepPlan, parts: Sequence[StaticPart], *, head_depth: int, budget: int, maps: np.ndarray | None
    ) -> None:
        """The tensors of one batch; rows of requests that are not there stand for nobody.

        Args:
            plan: of the step.
            parts: of the requests that have a row each.
            head_depth: guesses of the head that count.
            budget: rows of all trees.
            maps: of the scores, where the bucket has a price.
        """
        host, bucket, num = self._host, self._step.bucket, len(parts)
        requests = [part.item.request for part in parts]
        for row, request in enumerate(requests):
            self._hold(row, request)
        for row in range(num, self._num_rows):
            self._let_go(row)
        self._num_rows = num
        host["anchor_ids"][:num] = [request.token_ids[-1] for request in requests]
        host["context_lens"][:num] = [part.context_len for part in parts]
        host["numbers"][:num, 1] = [len(request.token_ids) for request in requests]
        host["has_context"][:num] = [part.adds_context for part in parts]
        host["limits"][:num] = [
            (0, 0, 0, 0)
            if part.is_prompt
            else (part.num_nodes, part.num_depths(head_depth), part.width, part.item.bias)
            for part in parts
        ]
        host["budget"][0] = budget
        if bucket.has_gaps:
            page_size = self._step.target.page_size
            host["gap_pages"][:num] = [part.gap // page_size for part in parts]
        if bucket.has_changes:
            self._write_changes(requests)
        if bucket.has_lookup:
            write_guesses(host, parts, head_depth)
        if bucket.has_price:
            self._write_price(plan, requests, maps)

    def clear(self) -> None:
        """Rows that stand for nobody, on the device as well."""
        for row in range(self._step.bucket.num_requests):
            self._let_go(row)
        self._num_rows = 0
        self._step.inputs.upload()

    def _hold(self, row: int, request: Request) -> None:
        """Pages of a running request only grow, so of a row that held the same request the new ones are written."""
        pages, table = request.pages.pages, self._host["page_table"]
        arrival, life, count = self._held[row]
        if (arrival, life) != (request.arrival, request.num_preemptions) or count > len(pages):
            table[row, :count] = self._scratch_page
            count, params = 0, request.params
            self._host["numbers"][row] = (as_signed(request.seed), 0, params.top_k, 0, 0)
            self._host["factors"][row] = walk_factors(params)
        if len(pages) > count:
            table[row, count : len(pages)] = pages[count:]
        self._held[row] = (request.arrival, request.num_preemptions, len(pages))

    def _let_go(self, row: int) -> None:
        for name in (*_COLUMNS, *(("gap_pages",) if self._step.bucket.has_gaps else ())):
            self._host[name][row] = self._scratch_page if name == "page_table" else 0
        self._held[row] = _NOBODY

    def _write_changes(self, requests: Sequence[Request]) -> None:
        """Penalties, biases, and tokens that may not be chosen yet, which change with every token."""
        host = self._host
        for row, request in enumerate(requests):
            walk = walk_sampling(request)
            ids, counts, bias = changed_tokens(walk, self._step.target.model.config.vocab_size)
            num, barred = len(ids), list(walk.barred_ids)
            host["numbers"][row, 3:] = (walk.num_barred, num)
            for name, values in (("ids", ids), ("counts", counts), ("bias", bias)):
                host[f"changed_{name}"][row, :num] = values.numpy()
            host["barred_ids"][row, : len(barred)] = barred
            host["barred_ids"][row, len(barred) :] = -1

    def _write_price(self, plan: StepPlan, requests: Sequence[Request], maps: np.ndarray | None) -> None:
        host, costs = self._host, plan.row_costs
        assert maps is not None
        assert costs is not None
        host["maps"][:] = maps
        host["kinds"][: len(requests)] = [not request.params.is_greedy for request in requests]
        # No step of this batch has more rows than the list is long.
        num = min(len(costs), len(host["row_costs"]))
        host["row_costs"][:num] = costs[:num]
        host["row_costs"][num:] = costs[num - 1]
