"""What an engine will hold in memory, reckoned before any of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

#: Share of the free memory that an unsized KV cache may take on a CPU, which others use too.
CPU_KV_SHARE = 0.3
#: Share of the free memory that everything together may take; the rest is for the allocator's and the driver's own.
DEVICE_SHARE = {"cpu": 1.0, "cuda": 0.94}


@dataclass(frozen=True, kw_only=True)
class MemoryItem:
    """One line of a plan."""

    name: str
    num_bytes: int
    #: How the number comes about.
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Everything that one rank holds on its device. See `fit_pages`."""

    device: torch.device
    #: What the device has to give.
    available_bytes: int
    #: All but the pages.
    items: tuple[MemoryItem, ...]
    #: Of one page, over all layers of the target, and over those of the draft head.
    target_page_bytes: int
    draft_page_bytes: int
    num_pages: int = 0
    #: Pages beyond the pool's own, to which rows without a request are written.
    num_scratch_pages: int = 0

    @property
    def fixed_bytes(self) -> int:
        """Everything but the pages of the pool."""
        return sum(item.num_bytes for item in self.items) + self.num_scratch_pages * self.page_bytes

    @property
    def page_bytes(self) -> int:
        """Of one page, target and draft context together."""
        return self.target_page_bytes + self.draft_page_bytes

    @property
    def usable_bytes(self) -> int:
        """What everything together may take."""
        return int(self.available_bytes * DEVICE_SHARE[self.device.type])

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.fixed_bytes + self.num_pages * self.page_bytes

    @property
    def affordable_pages(self) -> int:
        """Pages for which there is room, 0 where there is not even room for the rest."""
        room = self.usable_bytes - self.fixed_bytes
        if self.device.type == "cpu":
            room = min(room, int(self.available_bytes * CPU_KV_SHARE))
        return max(0, room // self.page_bytes)

    def lines(self) -> list[MemoryItem]:
        """All lines, pages included, largest first."""
        pages = self.num_pages + self.num_scratch_pages
        kv = [
            MemoryItem(name="KV pages", num_bytes=pages * self.target_page_bytes, detail=f"{pages} pages"),
            MemoryItem(name="draft KV pages", num_bytes=pages * self.draft_page_bytes, detail=f"{pages} pages"),
        ]
        shown = [item for item in (*self.items, *kv) if item.num_bytes]
        return sorted(shown, key=lambda item: -item.num_bytes)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, bytes, MiB and detail of all lines, of the sum, and of what there is."""
        free = f"free on {self.device}, of which {DEVICE_SHARE[self.device.type]:.0%} may be taken"
        lines = [(item.name, item.num_bytes, item.detail) for item in self.lines()]
        lines += [("together", self.total_bytes, ""), ("there is", self.available_bytes, free)]
        return [(name, str(num_bytes), _mib(num_bytes), detail) for name, num_bytes, detail in lines]

    def table(self) -> Any:
        """A `rich.table.Table` of `rows`."""
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("memory", no_wrap=True)
        table.add_column("bytes", justify="right", no_wrap=True)
        table.add_column("MiB", justify="right", no_wrap=True)
        table.add_column("of which", overflow="fold")
        for row in self.rows():
            table.add_row(*row, style="bold" if row[0] == "together" else None)
        return table

    def text(self) -> str:
        """The table in plain characters."""
        rows = [("memory", "bytes", "MiB", "of which"), *self.rows()]
        name, num_bytes, mib = (max(len(row[i]) for row in rows) for i in range(3))
        return "\n".join(f"{a:{name}}  {b:>{num_bytes}}  {c:>{mib}}  {d}".rstrip() for a, b, c, d in rows)


class DoesNotFitError(ValueError):
    """A plan asks for more than there is. A user is shown the sentence; a log has the table, a note of the error."""

    def __init__(self, sentence: str, plan: MemoryPlan):
        super().__init__(sentence)
        self.add_note(plan.text())


def fit_pages(plan: MemoryPlan, *, num_pages: int | None, pages_per_request: int, max_num_requests: int) -> MemoryPlan:
    """The plan with its pages.

    Args:
        plan: without pages yet.
        num_pages: of the KV cache; None is the largest batch's, or what there is room for where that is less.
        pages_per_request: of the longest request.
        max_num_requests: most requests at once.

    Raises:
        DoesNotFitError: it does not fit.
    """
    if num_pages is not None:
        plan = replace(plan, num_pages=num_pages)
        if plan.total_bytes > plan.usable_bytes:
            raise DoesNotFitError(
                f"num_pages = {num_pages}: {plan.total_bytes} bytes are needed, {plan.usable_bytes} may be taken; "
                f"with {plan.affordable_pages} pages they would do",
                plan,
            )
        return plan
    affordable = plan.affordable_pages
    if affordable < pages_per_request:
        raise DoesNotFitError(
            f"num_pages = None: one request of the longest kind needs {pages_per_request} pages of {plan.page_bytes} "
            f"bytes, the free memory allows {affordable}; lower max_model_len, max_num_batched_tokens or "
            "max_num_requests",
            replace(plan, num_pages=pages_per_request),
        )
    return replace(plan, num_pages=min(pages_per_request * max_num_requests, affordable))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"
