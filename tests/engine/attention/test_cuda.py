"""The CUDA attention back ends. Without a GPU, the stock kernels are replaced by stand-ins."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from tests.kernels.tree_batch import CHAIN, DEVICE, STAR, Batch, random_tree
from vllm_specplus.engine.attention.base import TREE_ATTRIBUTE, TreeAttentionMetadata
from vllm_specplus.engine.attention.cuda import kv_views
from vllm_specplus.engine.attention.flash import TreeFlashAttentionBackend
from vllm_specplus.engine.attention.triton import TreeTritonBackend
from vllm_specplus.kernels.tree_attention import tree_attention_reference

BACKENDS = [TreeFlashAttentionBackend, TreeTritonBackend]


def implementation(backend, batch: Batch, **features):
    heads = batch.num_kv_heads * batch.group
    arguments = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"} | features
    return backend.get_impl_cls()(
        heads, batch.head_size, batch.scale, batch.num_kv_heads, **arguments
    )


@pytest.fixture
def batch() -> Batch:
    return Batch([STAR, random_tree(9, 1), CHAIN], [17, 0, 40], group=4, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    """Stand-in for FlashAttention without a causal mask, whose empty rows have LSE inf."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
        block_table, return_softmax_lse, fa_version, num_splits,
    ):  # fmt: skip
        assert not causal
        assert return_softmax_lse
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k >= max(seqused_k.max(), 1)
        invisible = torch.zeros(len(q), max_seqlen_q, dtype=torch.bool)
        output, lse = tree_attention_reference(
            q, k, v, cu_seqlens_q, seqused_k, block_table, invisible, softmax_scale, "context"
        )
        return output.to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)

    if DEVICE == "cpu":
        monkeypatch.setattr(
            fa_utils, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False
        )


@pytest.fixture
def stock_calls(monkeypatch) -> list[SimpleNamespace]:
    """Calls of the stock forward, which is replaced by one that negates the queries."""
    calls = []

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        calls.append(SimpleNamespace(query=query, attn_metadata=attn_metadata))
        return output.copy_(-query)

    for implementation_class in (FlashAttentionImpl, TritonAttentionImpl):
        monkeypatch.setattr(implementation_class, "forward", forward)
    return calls


def forward(backend, batch: Batch, query, attn_metadata):
    return implementation(backend, batch).forward(
        None, query, None, None, batch.kv_cache, attn_metadata, torch.zeros_like(query)
    )


def attach(batch: Batch, rows, other_rows=None, other=None) -> SimpleNamespace:
    """Stock metadata with the trees of ``batch`` at ``rows`` of the batch."""
    _, _, _, query_start_loc, context_lens, block_table, ancestors, _ = batch.arguments
    tree = TreeAttentionMetadata(
        rows=rows,
        query_start_loc=query_start_loc,
        context_lens=context_lens,
        block_table=block_table,
        parents=torch.tensor([*itertools.chain(*batch.trees)], dtype=torch.int32, device=DEVICE),
        ancestors=ancestors,
        max_rows=batch.max_rows,
        max_context_len=max(batch.contexts),
        other_rows=other_rows,
        other=other,
    )
    return SimpleNamespace(**{TREE_ATTRIBUTE: tree})


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_among_other_and_padded_rows(backend, batch, stock_calls):
    tree_query = batch.arguments[0]
    # Other requests around the second tree; two rows that pad the batch for a CUDA graph.
    rows = torch.tensor([*range(3, 8), *range(10, 19), *range(19, 25)], device=DEVICE)
    other_rows = torch.tensor([0, 1, 2, 8, 9, 25], device=DEVICE)
    query = torch.randn(28, *tree_query.shape[1:]).to(tree_query)
    query[rows] = tree_query
    other = SimpleNamespace()
    output = forward(backend, batch, query, attach(batch, rows, other_rows, other))

    (call,) = stock_calls
    assert call.attn_metadata is other
    torch.testing.assert_close(output[other_rows], -query[other_rows])
    expected, _ = tree_attention_reference(*batch.arguments)
    torch.testing.assert_close(output[rows].float(), expected, atol=1.6e-2, rtol=1.6e-2)
    assert not output[26:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_request_has_a_tree(backend, batch, stock_calls):
    query = batch.arguments[0]
    output = forward(backend, batch, query, attach(batch, torch.arange(len(query), device=DEVICE)))
    assert not stock_calls
    expected, _ = tree_attention_reference(*batch.arguments)
    torch.testing.assert_close(output.float(), expected, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_begin_at_their_first_token_and_other_rows_see_themselves(
    backend, batch, stock_calls
):
    tree_query = batch.arguments[0]
    rows = torch.tensor([*range(3, 8), *range(10, 19), *range(19, 25)], device=DEVICE)
    other_rows = torch.tensor([0, 1, 2, 8, 9], device=DEVICE)
    query = torch.randn(27, *tree_query.shape[1:]).to(tree_query)
    query[rows] = tree_query
    value = torch.randn(27, batch.num_kv_heads, batch.head_size).to(tree_query)
    metadata = attach(batch, rows, other_rows)
    first = torch.tensor([16, 0, 3], dtype=torch.int32, device=DEVICE)
    getattr(metadata, TREE_ATTRIBUTE).first = first
    output = torch.zeros_like(query)
    implementation(backend.for_pictures(), batch).forward(
        None, query, None, value, batch.kv_cache, metadata, output
    )
    assert not stock_calls
    expected, _ = tree_attention_reference(*batch.arguments, first=first)
    torch.testing.assert_close(output[rows].float(), expected, atol=1.6e-2, rtol=1.6e-2)
    for head in range(query.shape[1]):
        assert output[other_rows, head].equal(value[other_rows, head // batch.group])
    assert not output[25:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attn_metadata", [None, SimpleNamespace()])
def test_without_trees_the_stock_forward_runs(backend, attn_metadata, batch, stock_calls):
    query = batch.arguments[0]
    torch.testing.assert_close(forward(backend, batch, query, attn_metadata), -query)
    (call,) = stock_calls
    assert call.attn_metadata is attn_metadata


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"sliding_window": 8}, "sliding-window"),
        ({"alibi_slopes": [0.5] * 8}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft-capping"),
        ({"attn_type": "encoder_only"}, "encoder"),
    ],
)
def test_refuses_what_the_tree_path_ignores(backend, feature, name, batch):
    with pytest.raises(NotImplementedError, match=name):
        implementation(backend, batch, **feature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_stock_backend_without_full_cuda_graphs(backend):
    stock = backend.__base__
    assert backend.get_name() == stock.get_name()
    builder = backend.get_builder_cls()
    assert issubclass(builder, stock.get_builder_cls())
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
    assert backend.forward_includes_kv_cache_update is False


def test_views_of_a_single_kv_head_have_aligned_strides():
    """FlashAttention 3 and 4 need strides of 16 bytes, also for a dimension of size 1."""
    key_cache, value_cache = kv_views(torch.zeros(4, 16, 1, 128).transpose(1, 2))
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride(2) * key_cache.element_size() % 16 == 0
