"""A drafter whose heads live in dedicated workers; the target's side fuses taps and asks for guesses.

Every worker mirrors the whole draft context, so any of them may guess for any request, and a worker that comes back
copies the context from a sibling. When the last one goes, speculation pauses and requests with context that is lost
draft no more; nothing fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from jetflow_cluster.engine.draft_link import DraftJob, Guess, LinkBrokenError, LinkListener, WorkerLink, tables_of
from jetflow_cluster.engine.draft_runner import draft_blocks, draft_sampling, take_pending
from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.tensor_parallel import Rows
from jetflow_cluster.models.draft_head import DraftFuser
from jetflow_cluster.tree.build import CandidateTable

_log = logging.getLogger(__name__)


class RemoteDrafter:
    """See the module.

    Args:
        fuser: the part of the head that stays beside the target.
        listener: where workers come in.
        page_size: slots per page.
        device: of the target.
        deadline_s: longest wait for a guess; a worker that takes longer is given up.
        pages_in_use: pages whose context a new worker must have.
    """

    def __init__(
        self,
        fuser: DraftFuser,
        listener: LinkListener,
        *,
        page_size: int,
        device: torch.device,
        deadline_s: float = 2.0,
        pages_in_use: Callable[[], Sequence[int]] | None = None,
    ):
        config = fuser.config
        self.tap_layer_ids = config.target_layer_ids
        self.max_depth = config.block_size - 1
        self.num_scratch_rows = config.block_size
        self.num_block_slots = None if config.causal else config.block_size
        self.epoch = 0
        self.deadline_s = deadline_s
        self.pages_in_use = pages_in_use or (lambda: ())
        self._fuser, self._listener, self.config = fuser, listener, config
        self._page_size, self._device = page_size, device
        self._links: list[WorkerLink] = []
        #: Whom the last plan was divided among, with their items' places, and how many items it had.
        self._asked: list[tuple[WorkerLink, list[int]]] = []
        self._num_asked = 0

    @property
    def num_workers(self) -> int:
        """Workers that answer, and those that have come and join with the next step."""
        return len(self._links) + self._listener.num_waiting

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """See `Drafter.fuse`."""
        return self._fuser.fuse(taps.to(self._fuser.dtype))

    def absorb(self, requests: Sequence[Request]) -> None:
        """See `Drafter.absorb`; without workers the vectors go on waiting."""
        if not self._asked:
            # A newcomer is given the context of a sibling, which has another question to answer first.
            self.admit()
        if not self._links:
            return
        rows = take_pending(requests)
        if rows is not None:
            job = DraftJob(context=(rows.fused.cpu(), rows.positions, rows.slots))
            self._each(self._links, lambda link: link.send(job))

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        """See `Drafter.draft`; requests whose worker is lost get none."""
        self.ask(plan)
        return self.answer()

    def ask(self, plan: StepPlan) -> None:
        """See `AheadDrafter.ask`."""
        assert not self._asked, "the last question was not answered"
        self._num_asked = len(plan.items)
        chosen = [i for i, item in enumerate(plan.items) if item.asks_head]
        self.absorb([plan.items[i].request for i in chosen])
        # A request that came while no worker was there may still have nothing absorbed.
        chosen = [i for i in chosen if not plan.items[i].request.pending_fused]
        if not chosen or not self._links:
            return
        links = list(self._links)
        part_of = {id(link): chosen[i :: len(links)] for i, link in enumerate(links)}

        def ask(link: WorkerLink) -> None:
            link.send(DraftJob(guess=self._guess([plan.items[i] for i in part_of[id(link)]])))

        alive = self._each([link for link in links if part_of[id(link)]], ask)
        self._asked = [(link, part_of[id(link)]) for link in alive]

    def answer(self) -> list[CandidateTable | None]:
        """See `AheadDrafter.answer`."""
        asked, self._asked = self._asked, []
        found: list[CandidateTable | None] = [None] * self._num_asked
        deadline = time.monotonic() + self.deadline_s
        part_of = {id(link): part for link, part in asked}

        def answer(link: WorkerLink) -> None:
            for i, table in zip(part_of[id(link)], tables_of(link.receive(deadline)), strict=True):
                found[i] = table

        # One may have been given up meanwhile.
        self._each([link for link, _ in asked if link in self._links], answer)
        return found

    def _guess(self, items: Sequence[ScheduledRequest]) -> Guess:
        requests = [item.request for item in items]
        depth = min(self.max_depth, max(item.head_depth for item in items))
        blocks = draft_blocks(requests, self.config, depth, self._page_size, torch.device("cpu"))
        return Guess(
            rows=Rows.of(blocks.batch),
            num_slots=blocks.num_slots,
            depth=depth,
            width=max(item.head_width for item in items),
            anchor_ids=[request.token_ids[-1] for request in requests],
            sampling=[draft_sampling(item) for item in items],
        )

    def _each(self, links: Sequence[WorkerLink], act: Callable[[WorkerLink], None]) -> list[WorkerLink]:
        """Acts on every link; gives broken ones up and returns the others."""
        alive = []
        for link in links:
            try:
                act(link)
                alive.append(link)
            except LinkBrokenError as error:
                self._give_up(link, error)
        return alive

    def _give_up(self, link: WorkerLink, error: LinkBrokenError) -> None:
        link.close()
        self._links.remove(link)
        if self._links:
            _log.warning("%s; %d other draft workers go on", error, len(self._links))
            return
        self.epoch += 1
        _log.warning("%s; it was the last one, so nothing is speculated until one comes back", error)

    def admit(self) -> None:
        """Takes newcomers in, with the context that the others hold."""
        for link in self._listener.take():
            try:
                context = self._context_of_sibling()
                if context is not None:
                    link.send(DraftJob(given_pages=context))
            except LinkBrokenError as error:
                _log.warning("%s before it had joined", error)
                link.close()
                continue
            self._links.append(link)
            _log.info("draft worker %s joined; there are %d", link.name, len(self._links))

    def _context_of_sibling(self) -> tuple[list[int], torch.Tensor] | None:
        """The pages in use and their context, from the first worker that gives it."""
        pages = list(self.pages_in_use())
        while pages and self._links:
            link = self._links[0]
            try:
                link.send(DraftJob(wanted_pages=pages))
                context: torch.Tensor = link.receive(time.monotonic() + self.deadline_s)
                return pages, context
            except LinkBrokenError as error:
                self._give_up(link, error)
        return None

    def close(self) -> None:
        """Lets all workers go."""
        self._listener.close()
        for link in self._links:
            link.close()
        self._links.clear()
