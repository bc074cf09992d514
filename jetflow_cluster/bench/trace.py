"""`jetflow trace`: what each step of one request guessed and kept, as one HTML file that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jetflow_cluster.bench.tree_svg import draw_tree
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.engine.protocols import StepRecord, TreeRecord
from jetflow_cluster.types import RequestOutput, SamplingParams

#: Tells the text of token ids.
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One request with every step that emitted tokens."""

    output: RequestOutput
    prompt_text: str
    steps: list[TreeRecord]
    decode: Decode


def record_trace(llm: LLM, prompt: str | Sequence[int], params: SamplingParams) -> Trace:
    """Runs one request alone and keeps its steps. The engine's `on_step` is put back afterwards.

    Raises:
        InvalidRequestError: the request cannot be honoured.
    """
    steps: list[TreeRecord] = []

    def keep(record: StepRecord) -> None:
        steps.extend(record.requests)

    engine = llm.engine
    previous, engine.on_step = engine.on_step, keep
    try:
        output = llm.generate([prompt], params)[0]
    finally:
        engine.on_step = previous
    decode = decoder(llm)
    return Trace(output=output, prompt_text=decode(output.prompt_token_ids), steps=steps, decode=decode)


def decoder(llm: LLM) -> Decode:
    """Text of token ids; without a tokenizer their numbers."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        return lambda ids: " ".join(str(token) for token in ids)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def trace_page(trace: Trace) -> str:
    """The HTML document."""
    sections = [_step_section(i, step, trace.decode) for i, step in enumerate(trace.steps)]
    return _PAGE.format(
        style=_STYLE,
        summary=_summary(trace),
        prompt=html.escape(trace.prompt_text),
        output=_tinted_output(trace),
        steps="\n".join(sections),
    )


def _summary(trace: Trace) -> str:
    stats, usage = trace.output.speculation, trace.output.usage
    facts = {
        "output tokens": usage.completion_tokens,
        "target passes": stats.num_steps + 1,
        "tokens per pass": f"{stats.mean_acceptance_length:.2f}",
        "guesses checked": stats.num_draft_nodes,
        "guesses kept": stats.num_accepted_tokens,
        "ended by": trace.output.finish_reason or "-",
    }
    return "".join(f"<div><b>{html.escape(str(value))}</b>{name}</div>" for name, value in facts.items())


def _tinted_output(trace: Trace) -> str:
    parts = []
    for i, step in enumerate(trace.steps):
        num_guessed = min(len(step.accepted_nodes) - 1, len(step.token_ids))
        for k, token in enumerate(step.token_ids):
            kind = "kept" if k < num_guessed else "own"
            text = html.escape(trace.decode([token]))
            parts.append(f'<a href="#step-{i}" class="{kind}" title="step {i}">{text}</a>')
    return "".join(parts)


def _step_section(index: int, step: TreeRecord, decode: Decode) -> str:
    num_kept = max(0, len(step.accepted_nodes) - 1)
    guessed = step.tree.num_nodes - 1
    note = f"{guessed} guesses, {num_kept} kept" if guessed else "no guesses" if index else "the pass over the prompt"
    expected = sum(math.exp(score / 65536) for score in step.tree.scores)
    emitted = html.escape(repr(decode(step.token_ids)))
    return (
        f'<section id="step-{index}"><h2>Step {index}<small>{note}; {expected:.1f} tokens expected, '
        f"{len(step.token_ids)} emitted: <code>{emitted}</code></small></h2>"
        f'<div class="tree">{draw_tree(step, decode)}</div></section>'
    )


_STYLE = """
:root { --ink: #1d2733; --dim: #66727f; --paper: #fbfaf7; --panel: #ffffff; --line: #d9d6cd; --edge: #b9bfc6;
  --kept: #0b7a75; --kept-soft: #d5efec; --own: #b4541a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #93a0ad; --paper: #14181d; --panel: #1b2127;
  --line: #313a43; --edge: #4d5965; --kept: #3cc6bd; --kept-soft: #134441; --own: #e89a62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
h2 small { font-weight: 400; color: var(--dim); margin-left: .75rem; }
p { color: var(--dim); max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.facts div { color: var(--dim); font-size: .85rem; }
.facts b { display: block; color: var(--ink); font-size: 1.25rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem;
  margin: 0 0 1.5rem; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
pre .prompt { color: var(--dim); } pre a { color: inherit; text-decoration: none; }
pre a.kept { background: var(--kept-soft); } pre a.own { color: var(--own); }
pre a:hover { outline: 1px solid var(--kept); }
code { font: 12px ui-monospace, monospace; }
section { border-top: 1px solid var(--line); padding: 1rem 0; } section:target h2 { color: var(--kept); }
.tree { overflow-x: auto; }
svg text { font: 12px ui-monospace, monospace; fill: #10202b; } svg .depth { fill: var(--dim); font-size: 11px; }
svg .edge { fill: none; stroke: var(--edge); } svg .edge.kept { stroke: var(--kept); stroke-width: 2.5; }
svg .node.kept { stroke: var(--kept); stroke-width: 2.5; } svg .node.root { fill: var(--panel); stroke: var(--edge); }
svg .node.own { fill: none; stroke: var(--own); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .plain { fill: var(--ink); } svg .chance { font-size: 10px; fill: #34505e; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Draft trees, step by step</title><style>{style}</style></head>
<body>
<h1>Draft trees, step by step</h1>
<p>Each step the draft head proposes a tree of continuations, the target checks all nodes in one pass, and the path that
the target itself would have written is kept. Darker nodes are likelier; the thick path was kept; the dashed node is the
target's own next token, which the next tree grows from.</p>
<div class="facts">{summary}</div>
<pre><span class="prompt">{prompt}</span>{output}</pre>
{steps}
</body>
</html>
"""
