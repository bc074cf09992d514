"""Runs the target model over a batch and owns its KV cache."""

from __future__ import annotations

import torch

from jetflow_cluster.cache.kv_cache import allocate_kv, kv_dtype
from jetflow_cluster.engine.batch import StepBatch
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.models.registry import TargetModel
from jetflow_kernels.commit_kv import commit_kv
from jetflow_kernels.upload import upload
from jetflow_kernels.warmup import launch_every_kernel


class TargetRunner:
    """The target's weights and pages on one device.

    Args:
        model: the weights.
        num_pages: of the pool.
        page_size: KV slots per page.
        num_scratch_pages: behind those of the pool, for rows without a request.
    """

    def __init__(self, model: TargetModel, *, num_pages: int, page_size: int, num_scratch_pages: int = 0):
        config = model.config
        self.model = model
        self.device = model.device
        self.page_size = page_size
        #: First slot of the scratch pages.
        self.scratch_slot = num_pages * page_size
        self.kv = allocate_kv(
            num_layers=config.num_layers,
            num_pages=num_pages + num_scratch_pages,
            page_size=page_size,
            num_kv_heads=model.num_local_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype(model.dtype, model.device),
            device=model.device,
        )
        launch_every_kernel(self.kv, num_heads=model.num_local_heads, dtype=model.dtype)

    def verify(
        self, batch: StepBatch, tap_layer_ids: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """One forward pass over all rows of a step; see `verify_rows`."""
        return self.verify_rows(batch.forward, batch.logits_rows, tap_layer_ids)

    def verify_rows(
        self, forward: ForwardBatch, rows: list[int], tap_layer_ids: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """One forward pass, with logits of some rows.

        Returns:
            logits ``[len(rows), vocab_size]``, or None when no row needs any; and the taps
            ``[T, len(tap_layer_ids) * hidden_size]`` of all rows, or None without tap ids.
        """
        hidden, taps = self.model.forward(forward, self.kv, tap_layer_ids)
        if not rows:
            return None, taps
        if len(rows) < hidden.shape[0]:
            hidden = hidden[upload(torch.tensor(rows), self.device)]
        return self.model.compute_logits(hidden), taps

    def wait(self) -> None:
        """Until the device has done what was queued. What a step took of which nothing is read would else count as the
        next one's."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def commit(self, source_slots: list[int], target_slots: list[int]) -> None:
        """Moves the KV of accepted nodes behind their prefixes; slots may overlap."""
        if source_slots:
            source = upload(torch.tensor(source_slots, dtype=torch.int64), self.device)
            target = upload(torch.tensor(target_slots, dtype=torch.int64), self.device)
            commit_kv(self.kv, source, target)
