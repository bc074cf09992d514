"""Engines whose steps run on static buffers."""

from __future__ import annotations

from pathlib import Path

from jetflow_cluster import LLM
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.graph_runner import GraphRunner, serve_from_graphs
from jetflow_cluster.engine.recording import Executing, Recorder
from jetflow_cluster.engine.target_runner import TargetRunner


def engine_options(target: Path, head: Path) -> dict[str, object]:
    """Of a small engine in fp64, on which both kinds of steps give the same tokens."""
    return {
        "model": str(target),
        "draft_head": str(head),
        "dtype": "float64",
        "draft_dtype": "float64",
        "page_size": 5,
        "num_pages": 300,
        "max_num_requests": 8,
        "max_num_batched_tokens": 128,
        "context_lookup": False,
        "tree_nodes": {1: 12},
    }


def make_static(llm: LLM, recorder: Recorder | None = None, *, max_len: int = 64) -> GraphRunner:
    """The same engine on buffers with a scratch page; every slot that nobody wrote is NaN."""
    engine, drafter = llm.engine, llm.engine.drafter
    assert isinstance(drafter, HeadDrafter)
    num_pages = engine.pool.num_pages
    model, page_size = engine.target.model, engine.target.page_size
    engine.target = TargetRunner(model, num_pages=num_pages, page_size=page_size, num_scratch_pages=1)
    engine.drafter = HeadDrafter(
        drafter.head, drafter.sidecar, model, num_pages=num_pages, page_size=page_size, num_scratch_pages=1
    )
    for kv in (engine.target.kv, engine.drafter.kv):
        kv.fill_(float("nan"))
    return serve_from_graphs(engine, max_len=max_len, recorder=recorder or Executing())
