"""Policy: how many nodes a tree gets, from what a step costs and what its nodes were worth at warm-up.

With ``a(n)`` the mean tokens that a tree of n nodes yields and ``s(r, n)`` the seconds of a whole step over r such
trees, the table holds for each r the n with the highest ``a(n) / s(r, n)``, or 1 (no speculation) where
``1 / s(r, 1)`` is about as high.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

#: A tree must promise this much over not speculating, or noise in the costs would decide.
MIN_GAIN = 1.05


class BudgetTable:
    """Nodes per tree by the number of decoding requests."""

    def __init__(self, nodes_by_running: Mapping[int, int]):
        if not nodes_by_running:
            raise ValueError("nodes_by_running = {}: needs at least one row")
        self.nodes_by_running = dict(sorted(nodes_by_running.items()))
        self._keys = list(self.nodes_by_running)

    @classmethod
    def from_costs(cls, step_s: Mapping[int, Mapping[int, float]], acceptance: Mapping[int, float]) -> BudgetTable:
        """The best n for each r that was measured; no speculation where nothing was.

        Noise only ever adds to a measured time, and a smaller tree costs no more than a larger one. So what a larger
        one took is a limit for it too, and a machine that was busy for a moment does not turn speculation on.

        Args:
            step_s: ``step_s[r][n]``, seconds of a whole step over r trees of n nodes; n = 1 must be there.
            acceptance: mean tokens per step and request with n nodes.
        """
        table: dict[int, int] = {}
        for running, by_nodes in step_s.items():
            least = {n: min(s for m, s in by_nodes.items() if m >= n) for n in by_nodes}
            plain = 1.0 / least[1]
            rates = {n: acceptance[n] / least[n] for n in by_nodes if n > 1 and n in acceptance}
            best = max(rates, key=lambda n: rates[n], default=1)
            table[running] = best if best > 1 and rates[best] > MIN_GAIN * plain else 1
        return cls(table or {1: 1})

    def nodes_per_tree(self, num_decoding: int) -> int:
        """The row of the next larger measured load; behind the last one, the last one's rows shared out."""
        index = bisect_left(self._keys, num_decoding)
        if index < len(self._keys):
            return self.nodes_by_running[self._keys[index]]
        last = self._keys[-1]
        return max(1, self.nodes_by_running[last] * last // num_decoding)
