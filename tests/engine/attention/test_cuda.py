"""The CUDA attention back ends. Without a GPU, the stock kernels are replaced by stand-ins."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from tests.kernels.tree_batch import CHAIN, DEVICE, STAR, Batch, random_tree
from vllm_specplus.capabilities import Need
from vllm_specplus.drafting.context_pages import ContextRows
from vllm_specplus.engine.attention import page_cache, warm_up
from vllm_specplus.engine.attention.base import TREE_ATTRIBUTE, TreeAttentionMetadata
from vllm_specplus.engine.attention.cuda import kv_views
from vllm_specplus.engine.attention.flash import TreeFlashAttentionBackend
from vllm_specplus.engine.attention.triton import PictureTritonBackend, TreeTritonBackend
from vllm_specplus.kernels import move_slots
from vllm_specplus.kernels import tree_attention as tree_kernels
from vllm_specplus.kernels.reference import tree_attention_reference

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
        parents=None,
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


@pytest.mark.parametrize("backend", [*BACKENDS, PictureTritonBackend])
@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"sliding_window": 8}, "sliding-window"),
        ({"alibi_slopes": [0.5] * 8}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft-capped"),
        ({"kv_cache_dtype": "fp8"}, "FP8"),
        ({"attn_type": "encoder_only"}, "encoder"),
    ],
)
def test_refuses_what_the_tree_path_ignores(backend, feature, name, batch):
    if backend is TreeTritonBackend and name not in ("FP8", "encoder"):
        implementation(backend, batch, **feature)
        return
    with pytest.raises(NotImplementedError, match=name):
        implementation(backend, batch, **feature)


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"alibi_slopes": [0.5] * 8, "use_alibi_sqrt": True}, "square roots"),
        ({"chunk_lookback": 1}, "does not know .chunk_lookback"),
    ],
)
def test_refuses_variants_of_what_it_serves(batch, feature, name):
    with pytest.raises(NotImplementedError, match=name):
        implementation(TreeTritonBackend, batch, **feature)


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


class Launches:
    """Records the launches of a Triton kernel, which it wraps, as the variants that they select:
    of tensors the data type and alignment, of integers divisibility by 16 and equality to 1."""

    def __init__(self, kernel, run: bool = True):
        self.kernel, self.run, self.variants = kernel, run, []
        # The interpreter keeps the decorator's arguments, the compiler what it makes of them.
        kept = getattr(kernel, "kwargs", None) or vars(kernel)
        self.unspecialized = kept.get("do_not_specialize") or ()

    def __getitem__(self, grid):
        def launch(*args, **constants):
            variant = [
                self.specialization(name, value)
                for name, value in zip(self.kernel.arg_names, args, strict=False)
            ]
            self.variants.append((*variant, *sorted(constants.items())))
            if self.run:
                self.kernel[grid](*args, **constants)

        return launch

    def specialization(self, name: str, value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16
        if name in self.unspecialized or isinstance(value, float):
            return None
        return value % 16 == 0, value == 1


def layers_of(backend, count: int, dtype=torch.float32) -> dict[str, SimpleNamespace]:
    """Layers of 4 query heads and, by turns, 1, 2 and 4 KV heads; some that the back end serves
    have a window, a soft cap and sinks."""
    made = {}
    for i in range(count):
        impl = object.__new__(backend.get_impl_cls())
        impl.num_heads, impl.head_size, impl.scale, impl.num_kv_heads = 4, 16, 0.25, 2 ** (i % 3)
        impl.num_queries_per_kv = impl.num_heads // impl.num_kv_heads
        impl.vllm_flash_attn_version, impl.batch_invariant_enabled = 3, False
        more = i % 6 >= 3 and Need.SLIDING_WINDOW in backend.supports
        impl.sliding_window, impl.logits_soft_cap = (7, 0) if more else (-1, -1), 2.0 * more
        impl.alibi_slopes, impl.sinks = None, torch.zeros(4, device=DEVICE) if more else None
        made[str(i)] = SimpleNamespace(
            get_attn_backend=lambda: backend,
            impl=impl,
            kv_cache=torch.randn(4, impl.num_kv_heads, 16, 32).to(DEVICE, dtype),
        )
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, 12])
def test_a_step_moves_all_layers_in_one_launch_and_one_upload(backend, count, monkeypatch):
    layers = layers_of(backend, count)
    layers["sharing"] = layers["0"]
    pages = page_cache(layers)
    before = [layer.kv_cache.clone() for layer in layers.values()]
    # Two requests, of which one moves across the end of a page.
    src, dst = np.array([15, 17, 18, 50, 53]), np.array([14, 15, 16, 49, 50])
    pages.move(src, dst)
    for layer, old in zip(layers.values(), before, strict=True):
        where = (torch.from_numpy(slots).to(DEVICE) for slots in (src, dst))
        move_slots.move_slots_reference(old, *where)
        assert torch.equal(layer.kv_cache, old)

    launches = Launches(move_slots._move_slots_kernel, run=False)
    monkeypatch.setattr(move_slots, "_move_slots_kernel", launches)
    with CountOperations() as operations:
        pages.move(src, dst)
    assert len(launches.variants) == 1
    # Beside it, one copy to the device, if it is one.
    assert len(operations.names) <= 2, operations.names


class CountOperations(TorchDispatchMode):
    """Names of the tensor operations that torch runs meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_empty_move_launches_nothing(monkeypatch):
    launches = Launches(move_slots._move_slots_kernel)
    monkeypatch.setattr(move_slots, "_move_slots_kernel", launches)
    none = np.empty(0, np.int64)
    page_cache(layers_of(TreeTritonBackend, 2)).move(none, none)
    assert not launches.variants


def test_reads_layer_by_layer():
    layers = layers_of(TreeTritonBackend, 3)
    slots = np.array([3, 16, 63])
    read = page_cache(layers).read(slots)
    for (keys, values), layer in zip(read, layers.values(), strict=True):
        for i, slot in enumerate(slots.tolist()):
            row = layer.kv_cache[slot // 16, :, slot % 16]
            assert torch.equal(torch.cat((keys[i], values[i]), -1), row)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, PictureTritonBackend])
def test_warm_up_compiles_what_trees_of_any_size_run(backend, monkeypatch):
    """Each variant of a kernel that a step selects was selected before; the caches are as they
    were."""
    monkeypatch.setattr(tree_kernels, "_num_processors", lambda device: 132)
    kernels = [Launches(tree_kernels._tree_attention_kernel),
               Launches(tree_kernels._merge_splits_kernel)]  # fmt: skip
    monkeypatch.setattr(tree_kernels, "_tree_attention_kernel", kernels[0])
    monkeypatch.setattr(tree_kernels, "_merge_splits_kernel", kernels[1])
    layers = layers_of(backend, 6, torch.bfloat16)
    before = [layer.kv_cache.clone() for layer in layers.values()]
    warm_up(layers, [page_cache(layers)], torch.bfloat16, rows=20)
    for layer, old in zip(layers.values(), before, strict=True):
        assert torch.equal(layer.kv_cache, old)
    warm = [set(kernel.variants) for kernel in kernels]

    for kernel in kernels:
        kernel.variants.clear()
    for layer in layers.values():
        for rows, context in ((1, 3), (5, 600), (8, 0), (20, 1100)):
            keys, _ = kv_views(layer.kv_cache)
            tree = layer.impl._chain(rows, context, keys)
            query = torch.randn(rows, 4, 16).to(DEVICE, torch.bfloat16)
            layer.impl._tree_forward(layer, query, layer.kv_cache, tree, torch.empty_like(query))
    for kernel, variants in zip(kernels, warm, strict=True):
        assert set(kernel.variants) <= variants
    assert kernels[0].variants


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draft_attends_to_the_pages_as_they_lie(batch, backend):
    """Behind contexts of at least one token, and to nothing else."""
    query, keys, values, starts, contexts, table, ancestors, scale = batch.arguments
    contexts = contexts.clamp(min=1)
    layer = SimpleNamespace(kv_cache=batch.kv_cache)
    pages = backend.page_cache.context_pages(layer)
    assert (pages.kv_heads, pages.head_dim, pages.page) == (2, 64, batch.block_size)
    rows = ContextRows(starts, contexts, table, batch.max_rows, int(contexts.max()))
    # The reference weighs what is not seen with 0, where these caches hold NaN.
    seen = keys.nan_to_num(), values.nan_to_num()
    expected, _ = tree_attention_reference(
        query, *seen, starts, contexts, table, ancestors, scale, "context"
    )
    out = pages.attend(query, rows, scale)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.float(), expected, atol=1.6e-2, rtol=1.6e-2)
