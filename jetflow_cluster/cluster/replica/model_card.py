"""What a replica says of its model."""

from __future__ import annotations

from pathlib import Path

from jetflow_cluster import __version__
from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.engine.resolve import arithmetic
from jetflow_cluster.models.stored_files import read_json
from jetflow_cluster.rpc.v1 import inference_pb2 as pb

#: Largest tree that a request may ask for.
_MAX_TREE_NODES = 512


def model_card(config: ReplicaServerConfig, frontend: EngineFrontend) -> pb.ModelCard:
    """Name, shape and limits of what is served."""
    engine, model = frontend.engine, frontend.engine.target.model
    drafter = engine.drafter
    return pb.ModelCard(
        model=config.model_name or _checkpoint_name(frontend.config.model),
        architecture=model.config.architecture,
        vocab_size=frontend.vocab_size,
        max_model_len=frontend.max_model_len,
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=sorted(model.config.eos_token_ids),
        has_chat_template=_has_chat_template(frontend.target_dir),
        tensor_parallel_size=frontend.config.tensor_parallel_size,
        num_draft_workers=config.num_draft_workers,
        has_draft_head=drafter is not None,
        max_tree_nodes=1 if drafter is None else min(_MAX_TREE_NODES, frontend.config.max_num_batched_tokens),
        max_depth=engine.scheduler.max_draft_depth,
        version=__version__,
        arithmetic=str(arithmetic(frontend.config)),
    )


def _checkpoint_name(model: str | None) -> str:
    """A Hugging Face id as it is, a directory by its last part, the embedded default as such."""
    if model is None:
        return "default"
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and bool(read_json(settings).get("chat_template"))
