"""Target families by the architecture that `config.json` names. A further family is one file and one line."""

from __future__ import annotations

from jetflow_cluster.models.qwen3 import Qwen3Model

TARGETS = {"Qwen3ForCausalLM": Qwen3Model}

#: Any target; all families offer what `Qwen3Model` does.
TargetModel = Qwen3Model
