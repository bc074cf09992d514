"""One draft tree as inline SVG: depths from left to right, likelier nodes darker, the kept path marked."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from jetflow_cluster.engine.protocols import TreeRecord
from jetflow_cluster.tree.draft_tree import DraftTree

_NODE_W, _NODE_H = 98, 24
_GAP_X, _GAP_Y = 26, 7
_TOP = 20
_MAX_CHARS = 8
#: Fill of a node of probability 0 and of probability 1.
_UNLIKELY, _LIKELY = (238, 243, 246), (116, 196, 210)


def draw_tree(step: TreeRecord, decode: Callable[[Sequence[int]], str]) -> str:
    """An ``<svg>`` element. Nodes carry their text and probability; hovering tells ids and the path's probability.

    Args:
        step: the tree, the accepted nodes (root first), and the emitted tokens.
        decode: text of token ids.
    """
    tree = step.tree
    has_own = len(step.token_ids) >= len(step.accepted_nodes)
    last = step.accepted_nodes[-1]
    rows = _leaf_rows(tree, last if has_own else None)
    kept = set(step.accepted_nodes)
    centers = [(_left(depth), _top(row)) for depth, row in zip(tree.depths, rows, strict=False)]
    edges, nodes = [], []
    for i, (x, y) in enumerate(centers):
        if i:
            edges.append(_edge(centers[tree.parents[i]], (x, y), "edge kept" if i in kept else "edge"))
        nodes.append(_node(tree, i, x, y, is_kept=i in kept, text=decode([tree.token_ids[i]])))
    num_columns = max(tree.depths) + 1
    if has_own:
        x, y = _left(tree.depths[last] + 1), _top(rows[-1])
        edges.append(_edge(centers[last], (x, y), "edge kept"))
        nodes.append(_own_node(x, y, step.token_ids[-1], decode([step.token_ids[-1]])))
        num_columns = max(num_columns, tree.depths[last] + 2)
    width, height = _left(num_columns) - _GAP_X + 2, _top(max(rows) + 1)
    titles = [
        f'<text class="depth" x="{_left(d)}" y="12">{"anchor" if d == 0 else f"+{d}"}</text>'
        for d in range(num_columns)
    ]
    return f'<svg width="{width}" height="{height}" role="img">{"".join(titles + edges + nodes)}</svg>'


def _left(depth: int) -> int:
    return 1 + depth * (_NODE_W + _GAP_X)


def _top(row: int) -> int:
    return _TOP + row * (_NODE_H + _GAP_Y)


def _leaf_rows(tree: DraftTree, own_parent: int | None) -> list[int]:
    """Vertical place of each node: leaves in depth-first order, inner nodes at their first child.

    The target's own token, if shown, is the last entry and the first child of `own_parent`.
    """
    children: list[list[int]] = [[] for _ in tree.parents]
    for i, parent in enumerate(tree.parents):
        if i:
            children[parent].append(i)
    if own_parent is not None:
        children[own_parent].insert(0, len(children))
        children.append([])
    rows = [0] * len(children)
    next_row, stack = 0, [0]
    while stack:
        node = stack.pop()
        rows[node] = next_row
        if children[node]:
            stack += reversed(children[node])
        else:
            next_row += 1
    return rows


def _edge(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    x0, y0, x1, y1 = start[0] + _NODE_W, start[1] + _NODE_H / 2, end[0], end[1] + _NODE_H / 2
    middle = (x0 + x1) / 2
    return f'<path class="{kind}" d="M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"/>'


def _node(tree: DraftTree, i: int, x: float, y: float, *, is_kept: bool, text: str) -> str:
    path_chance = math.exp(tree.scores[i] / 65536)
    chance = math.exp((tree.scores[i] - tree.scores[tree.parents[i]]) / 65536) if i else 1.0
    title = f"node {i}, token {tree.token_ids[i]} {text!r}: {chance:.1%} behind its parent, {path_chance:.2%} as a path"
    kind = "node" + (" kept" if is_kept else "") + ("" if i else " root")
    fill = "" if i == 0 else f' fill="{_colour(path_chance)}"'
    label = _label(text, tree.token_ids[i])
    chance_text = f'<text class="chance" x="{x + _NODE_W - 4:g}" y="{y + 16:g}" text-anchor="end">{chance:.0%}</text>'
    return (
        f'<g><title>{html.escape(title)}</title><rect class="{kind}"{fill} x="{x:g}" y="{y:g}" '
        f'width="{_NODE_W}" height="{_NODE_H}" rx="4"/>'
        f'<text class="{"label" if i else "plain"}" x="{x + 6:g}" y="{y + 16:g}">{label}</text>'
        f"{chance_text if i else ''}</g>"
    )


def _own_node(x: float, y: float, token: int, text: str) -> str:
    title = html.escape(f"token {token} {text!r}: the target's own")
    return (
        f'<g><title>{title}</title><rect class="node own" x="{x:g}" y="{y:g}" width="{_NODE_W}" height="{_NODE_H}" '
        f'rx="4"/><text class="plain" x="{x + 6:g}" y="{y + 16:g}">{_label(text, token)}</text></g>'
    )


def _label(text: str, token: int) -> str:
    shown = text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")
    if not shown.isprintable() or "\ufffd" in shown:
        shown = f"#{token}"
    if len(shown) > _MAX_CHARS:
        shown = shown[: _MAX_CHARS - 1] + "\u2026"
    return html.escape(shown)


def _colour(chance: float) -> str:
    share = math.sqrt(max(0.0, min(1.0, chance)))
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_UNLIKELY, _LIKELY, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
