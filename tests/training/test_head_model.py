"""The head as it is trained is the head as it is served."""

from pathlib import Path

import pytest
import torch

from jetflow_cluster.layers.rotary import RopeConfig
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.models.draft_head import DraftHead, DraftHeadConfig
from jetflow_cluster.models.loader import load_draft_head
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_cluster.training.head_model import TrainableHead, load_head, save_head
from jetflow_kernels.tree_attention import plan_tree_attention

PAGE = 16


def head_config(causal: bool, num_layers: int = 2) -> DraftHeadConfig:
    return DraftHeadConfig(
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        max_position_embeddings=256,
        dtype="float32",
        block_size=8,
        num_target_layers=4,
        target_layer_ids=(0, 1, 2),
        mask_token_id=1,
        causal=causal,
    )


class _Target:
    """What `load_draft_head` reads of a target."""

    dtype = torch.float32
    config = TargetConfig(
        **{
            f: getattr(head_config(True), f)
            for f in (
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "intermediate_size",
                "vocab_size",
                "rms_norm_eps",
                "rope",
                "max_position_embeddings",
                "dtype",
            )
        },
        num_layers=4,
        architecture="Qwen3ForCausalLM",
        tie_word_embeddings=True,
        eos_token_ids=(0,),
    )


def served(head: DraftHead, taps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """One block behind `taps`, over paged K and V."""
    num, size = len(taps), len(embeds)
    pages = (num + size + PAGE - 1) // PAGE
    config = head.config
    kv = torch.full((config.num_layers, 2, pages, PAGE, config.num_kv_heads, config.head_dim), float("nan"))
    slots = torch.arange(num + size)
    head.project_context(head.fuse(taps), slots[:num], slots[:num], kv)
    plan = plan_tree_attention(
        query_lens=[size],
        context_lens=[num],
        page_table=torch.arange(pages)[None],
        parents=torch.arange(-1, size - 1),
        page_size=PAGE,
        bidirectional=not config.causal,
    )
    batch = ForwardBatch(
        token_ids=torch.zeros(size, dtype=torch.int64), positions=slots[num:], slot_mapping=slots[num:], attention=plan
    )
    return head(embeds, batch, kv)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("anchors", [[5, 17, 30]], ids=["three-blocks"])
def test_dense_blocks_equal_the_served_head(tmp_path: Path, causal: bool, anchors: list[int]) -> None:
    torch.manual_seed(0)
    trained = TrainableHead(head_config(causal)).eval()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_head(tmp_path, trained, torch.float32)
    head = load_draft_head(tmp_path, _Target(), device=torch.device("cpu"), tp=TpGroup.single())
    taps, embeds = torch.randn(1, 40, 96), torch.randn(1, len(anchors), 8, 32)
    with torch.inference_mode():
        angles = trained.angles(48)
        dense = trained(taps, embeds, torch.tensor([anchors]), torch.zeros(1, dtype=torch.int64), angles)
        for i, anchor in enumerate(anchors):
            expected = served(head, taps[0, :anchor], embeds[0, i])[1:]
            torch.testing.assert_close(dense[0, i], expected, atol=2e-4, rtol=2e-4)


def test_padding_at_the_left_changes_nothing() -> None:
    torch.manual_seed(1)
    head = TrainableHead(head_config(True)).eval()
    taps, embeds = torch.randn(1, 20, 96), torch.randn(1, 1, 8, 32)
    padded = torch.cat((torch.full((1, 6, 96), 7.0), taps), 1)
    with torch.inference_mode():
        plain = head(taps, embeds, torch.tensor([[15]]), torch.tensor([0]), head.angles(48))
        shifted = head(padded, embeds, torch.tensor([[21]]), torch.tensor([6]), head.angles(48))
    torch.testing.assert_close(plain, shifted, atol=1e-5, rtol=1e-5)


def test_saved_and_read_again(tmp_path: Path) -> None:
    head = TrainableHead(head_config(True, num_layers=1))
    save_head(tmp_path, head, torch.float32)
    again = load_head(tmp_path)
    assert again.config.causal and again.config.block_size == 8
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
