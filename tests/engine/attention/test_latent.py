"""Back ends of multi-head latent attention: what they refuse, how rows that decode are described,
trees taken out of them, and latents moved."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    QueryLenSupport,
)

from tests.kernels.tree_batch import CHAIN, STAR, Batch
from vllm_specplus.engine.attention import base, ours, page_cache
from vllm_specplus.engine.attention.cpu_latent import (
    CpuLatentCache,
    TreeCPULatentBackend,
    TreeCPULatentBuilder,
)
from vllm_specplus.engine.attention.triton_latent import (
    CudaLatentCache,
    TreeTritonLatentBackend,
    TreeTritonLatentBuilder,
)
from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import latent_tree_attention_reference

RANK, ROPE, HEADS = 512, 64, 4
SIZE = RANK + ROPE
SIZES = {
    "q_lora_rank": 64, "kv_lora_rank": RANK, "qk_nope_head_dim": 32, "qk_rope_head_dim": ROPE,
    "qk_head_dim": 32 + ROPE, "v_head_dim": 32, "kv_b_proj": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch) -> SimpleNamespace:
    model = SimpleNamespace(dtype=torch.float32, rswa_window=None)
    config = SimpleNamespace(model_config=model)
    monkeypatch.setattr(base, "get_current_vllm_config_or_none", lambda: config)
    return config


def implementation(**others):
    arguments = {
        "num_heads": HEADS, "head_size": SIZE, "scale": 0.1, "num_kv_heads": 1,
        "alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto",
        "logits_soft_cap": None, "attn_type": "decoder", "kv_sharing_target_layer_name": None,
        "indexer": None, **SIZES,
    }  # fmt: skip
    return TreeCPULatentBackend.get_impl_cls()(**(arguments | others))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"indexer": object()}, "sparse attention"),
        ({"sliding_window": 8}, "sliding-window"),
        ({"logits_soft_cap": 3.0}, "soft-capped"),
        ({"kv_cache_dtype": "fp8"}, "FP8 KV cache"),
        ({"q_pad_num_heads": 8}, "argument q_pad_num_heads=8"),
        ({"topk_indices_buffer": torch.zeros(1)}, "argument topk_indices_buffer"),
    ],
)
def test_what_the_tree_path_ignores_is_refused(argument, words):
    assert implementation(q_pad_num_heads=None).kv_lora_rank == RANK
    with pytest.raises(NotImplementedError, match=words):
        implementation(**argument)


@pytest.mark.parametrize("builder", [TreeCPULatentBuilder, TreeTritonLatentBuilder])
def test_every_row_that_decodes_is_described(builder):
    """Requests of 1, 3 and 2 rows: the stock kernel has one row per request."""
    assert builder.query_len_support is QueryLenSupport.VARLEN
    starts = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    table = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    lengths = torch.tensor([7, 20, 2], dtype=torch.int32)
    decode = builder._build_decode(
        builder.__new__(builder), table, lengths, 20, starts, starts, 6, 3, None
    )
    assert decode.seq_lens.tolist() == [7, 18, 19, 20, 1, 2]
    assert decode.block_table.tolist() == [[1, 2], *[[3, 4]] * 3, *[[5, 6]] * 2]
    assert decode.seq_lens.dtype == decode.block_table.dtype == torch.int32
    alone = builder._build_decode(
        builder.__new__(builder), table, lengths, 20, starts[:4], starts[:4], 3, 1, None
    )
    assert alone.seq_lens is lengths  # one row each: nothing is copied


@dataclass
class Metadata:
    """Of vLLM's, what the decode path reads."""

    decode: MLACommonDecodeMetadata


@pytest.mark.parametrize("compiled", [True, False])
def test_trees_are_taken_out_of_the_rows_that_decode(monkeypatch, compiled):
    """Rows 0 and 1 are a chain of another request, 2 to 12 trees; behind them prompts are read."""
    if not compiled:
        monkeypatch.setattr(native, "_load", lambda: "no compiler")
    batch = Batch([CHAIN, STAR], [17, 3], num_kv_heads=1, group=HEADS, head_size=SIZE // 2)
    latents = batch.kv_cache[:, 0].contiguous()
    _, _, _, starts, contexts, table, ancestors, _ = batch.arguments
    rows = torch.arange(2, 13)
    impl, query = implementation(), torch.randn(13, HEADS, SIZE)
    parents = torch.tensor([*CHAIN, *STAR], dtype=torch.int32)
    tree = base.TreeAttentionMetadata(
        rows=rows, query_start_loc=starts, context_lens=contexts, block_table=table,
        parents=parents, ancestors=None, max_rows=batch.max_rows, max_context_len=17,
        other_rows=torch.tensor([0, 1, 13, 14, 15]), other=None,
    )  # fmt: skip
    # The chain's rows are of the text of the first tree, of which they see 10 and 11 tokens.
    lengths = torch.full((13,), 99, dtype=torch.int32)
    lengths[:2] = torch.tensor([10, 11])
    decode = MLACommonDecodeMetadata(table[:1].expand(13, -1).contiguous(), lengths, None)
    metadata = Metadata(decode)
    setattr(metadata, base.TREE_ATTRIBUTE, tree)
    parts = query.split([RANK, ROPE], dim=-1)
    output, _ = impl.forward_mqa(parts, latents, metadata, None)
    expected = torch.zeros(13, HEADS, RANK)
    latent_tree_attention_reference(
        query, latents, expected, rows=rows, query_start_loc=starts, context_lens=contexts,
        block_table=table, ancestors=ancestors, scale=0.1,
    )  # fmt: skip
    keys = latents[table[0].long()].flatten(0, 1)
    for row, seen in ((0, 10), (1, 11)):
        weights = (query[row] @ keys[:seen].T * 0.1).softmax(-1)
        expected[row] = weights @ keys[:seen, :RANK]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


class Layer(SimpleNamespace):
    def get_attn_backend(self):
        return self.backend


def layers(backend, shape=(4, 16, SIZE)) -> list[Layer]:
    impl = SimpleNamespace(kv_lora_rank=RANK, head_size=SIZE)
    return [Layer(backend=backend, impl=impl, kv_cache=torch.randn(shape)) for _ in range(3)]


@pytest.mark.parametrize("kind", [CpuLatentCache, CudaLatentCache])
def test_latents_are_moved_and_read(kind):
    """The second move's source is the first one's neighbour; a destination was read before."""
    made = layers(None)
    made[2].kv_cache = made[0].kv_cache  # shared: moved once
    before = [layer.kv_cache.view(-1, SIZE).clone() for layer in made]
    cache = kind(made)
    src, dst = np.array([20, 21, 40]), np.array([19, 20, 39])
    cache.move(src, dst)
    for layer, rows in zip(made, before, strict=True):
        moved = layer.kv_cache.view(-1, SIZE)
        assert torch.equal(moved[dst], rows[src])
        untouched = np.setdiff1d(np.arange(len(rows)), dst)
        assert torch.equal(moved[untouched], rows[untouched])
    for (latent, rotary), layer in zip(cache.read(src), made, strict=True):
        rows = layer.kv_cache.view(-1, 1, SIZE)[src]
        assert torch.equal(latent, rows[..., :RANK])
        assert torch.equal(rotary, rows[..., RANK:])


@pytest.mark.parametrize("backend", [TreeCPULatentBackend, TreeTritonLatentBackend])
def test_a_cache_of_another_shape_is_refused(backend):
    (layer, *_) = layers(backend, (4, 1, 16, SIZE))
    layer.impl = object.__new__(backend.get_impl_cls())
    layer.impl.head_size, layer.impl.kv_lora_rank = SIZE, RANK
    assert ours(layer)
    with pytest.raises(ValueError, match="or one latent for both, not a KV cache of shape"):
        page_cache({"a": layer})
