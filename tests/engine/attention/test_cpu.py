"""The CPU back end: what it refuses, and how it reads and moves the pages of unlike layers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn

from vllm_specplus.drafting.context_pages import ContextRows
from vllm_specplus.engine import attention
from vllm_specplus.engine.attention import base, page_cache
from vllm_specplus.engine.attention.cpu import PictureCPUBackend, TreeCPUBackend
from vllm_specplus.engine.attention.cpu_latent import CpuLatentCache
from vllm_specplus.kernels import native

PAGES, BLOCK_SIZE = 6, 32
#: KV heads and head size of every layer; the last one reads the cache of the first.
UNLIKE = ((2, 64), (4, 64), (1, 64), (4, 64), (2, 32))


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch) -> SimpleNamespace:
    """What the stock constructor reads of vLLM's config."""
    model = SimpleNamespace(dtype=torch.float32, rswa_window=None)
    config = SimpleNamespace(model_config=model)
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(base, "get_current_vllm_config_or_none", lambda: config)
    return config


def implementation(backend=TreeCPUBackend, heads: int = 4, head_size: int = 64, **features):
    arguments = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"} | features
    return backend.get_impl_cls()(4, head_size, 0.125, heads, **arguments)


#: By what attends to trees, and not by a branch that sees pictures alone.
SERVED = ("sliding-window", "ALiBi", "soft-capped", "sinks", "FP8 KV cache")


@pytest.mark.parametrize("backend", [TreeCPUBackend, PictureCPUBackend])
@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"sliding_window": 8}, "sliding-window"),
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft-capped"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "FP8 KV cache"),
        ({"kv_cache_dtype": "a_dtype_of_tomorrow"}, "quantized KV cache"),
        ({"attn_type": "encoder_only"}, "encoder"),
        ({"attn_type": "encoder_decoder"}, "cross attention"),
    ],
)
def test_refuses_what_the_tree_path_ignores(backend, feature, name):
    implementation(backend)
    if backend is TreeCPUBackend and name in SERVED:
        implementation(backend, **feature)
        return
    with pytest.raises(NotImplementedError, match=name):
        implementation(backend, **feature)


def test_sinks_are_taken_anew_when_weights_are_others():
    """They are copied where the kernel reads another type than they have."""
    impl = implementation(sinks=torch.zeros(4, dtype=torch.bfloat16))
    impl.layout, impl._batch = "vec", native.TreeBatch()
    attention.forget_weights({"a": Layer(impl=impl)})
    assert impl.layout is impl._batch is None


def test_refuses_a_reference_window(vllm_config):
    vllm_config.model_config.rswa_window = 64
    with pytest.raises(NotImplementedError, match="reference sliding-window attention"):
        implementation()


def test_refuses_context_parallelism():
    with pytest.raises(NotImplementedError, match="context parallelism"):
        base.check_launch(TreeCPUBackend.supports, context_parallel=2)


def test_refuses_an_argument_that_it_does_not_know(monkeypatch):
    known = cpu_attn.CPUAttentionBackendImpl.__init__

    def tomorrow(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
        kv_cache_dtype, temperature_of_heads=None,
    ):  # fmt: skip
        known(
            self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype,
        )  # fmt: skip

    monkeypatch.setattr(cpu_attn.CPUAttentionBackendImpl, "__init__", tomorrow)
    implementation()
    implementation(temperature_of_heads=None)
    for value in (1.0, torch.zeros(4), np.zeros(4)):
        with pytest.raises(NotImplementedError, match="argument temperature_of_heads="):
            implementation(temperature_of_heads=value)


class Layer(SimpleNamespace):
    def get_attn_backend(self):
        return TreeCPUBackend


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def layers(request) -> dict[str, Layer]:
    """Layers of other heads and head sizes, with a token's keys and values in every slot, as
    vLLM's cache writer puts them."""
    made, dtype = {}, request.param
    for i, (heads, head_size) in enumerate(UNLIKE):
        impl = implementation(heads=heads, head_size=head_size)
        cache = torch.zeros(PAGES, heads, BLOCK_SIZE, 2 * head_size, dtype=dtype)
        slots = torch.arange(PAGES * BLOCK_SIZE)
        keys, values = torch.randn(2, len(slots), heads, head_size).to(dtype)
        isa = cpu_attn._get_attn_isa(dtype, BLOCK_SIZE, head_size)
        halves = cache.view(PAGES, heads, 2 * BLOCK_SIZE, head_size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)
        made[str(i)] = Layer(kv_cache=cache, impl=impl, isa=isa, keys=keys, values=values)
    made["sharing"] = made["0"]
    return made


@pytest.fixture(params=["native", "reference"])
def kernels(request, monkeypatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(native, "library", lambda: None)


def test_reads_every_layer_as_it_lies(layers):
    pages = page_cache(layers)
    slots = np.array([0, 31, 32, 100, 5], np.int64)
    read = list(pages.read(slots))
    assert len(read) == len(layers)
    for (keys, values), layer in zip(read, layers.values(), strict=True):
        assert torch.equal(keys, layer.keys[slots])
        assert torch.equal(values, layer.values[slots])


@pytest.mark.usefixtures("kernels")
def test_moves_every_layer_once(layers):
    """Down by one and by two, over a page's end: a cache that is moved twice shows."""
    pages = page_cache(layers)
    pages.warm_up()
    src = np.array([31, 33, 34, 70, 150], np.int64)
    dst = np.array([30, 31, 32, 69, 149], np.int64)
    pages.move(src, dst)
    everything = np.arange(PAGES * BLOCK_SIZE)
    now = everything.copy()
    now[dst] = src
    for (keys, values), layer in zip(pages.read(everything), layers.values(), strict=True):
        assert torch.equal(keys, layer.keys[now])
        assert torch.equal(values, layer.values[now])


def test_layers_that_lie_alike_move_in_one_call(layers, monkeypatch):
    library, calls = native.library(), []

    def counting(*args):
        calls.append(args)
        library.specplus_move_slots(*args)

    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(specplus_move_slots=counting))
    pages = page_cache(layers)
    pages.move(np.array([9], np.int64), np.array([8], np.int64))
    assert len(calls) == len(set(UNLIKE)) < len(layers)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_draft_attends_to_the_pages_as_they_lie(layers, in_place):
    """Of each layer as if it were the last; two requests, of two rows and of three."""
    table = torch.tensor([[3, 1, 0], [2, 4, 5]], dtype=torch.int32)
    contexts = torch.tensor([70, 33], dtype=torch.int32)
    rows = ContextRows(torch.tensor([0, 2, 5], dtype=torch.int32), contexts, table, 3, 70)
    for layer in layers.values():
        pages = attention.context_pages({"a": layer})
        assert pages.in_place
        pages.in_place = in_place
        query = torch.randn(5, 2 * pages.kv_heads, pages.head_dim).to(pages.dtype)
        out = pages.attend(query, rows, 0.125)
        for row, request in enumerate((0, 0, 1, 1, 1)):
            seen = torch.arange(int(contexts[request]))
            slots = table[request, seen // BLOCK_SIZE].long() * BLOCK_SIZE + seen % BLOCK_SIZE
            keys, values = (
                each[slots].float().repeat_interleave(2, 1) for each in (layer.keys, layer.values)
            )
            weights = torch.einsum("hd,shd->hs", query[row].float(), keys).mul(0.125).softmax(-1)
            expected = torch.einsum("hs,shd->hd", weights, values)
            tolerance = 1e-5 if pages.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out[row].float(), expected, atol=tolerance, rtol=tolerance)


def test_a_draft_attends_to_the_last_layer_of_full_attention():
    def layer(name: str, **features) -> SimpleNamespace:
        cache = SimpleNamespace(context_pages=lambda layer: name)
        backend = SimpleNamespace(page_cache=cache)
        return SimpleNamespace(get_attn_backend=lambda: backend, **features)

    full, window = layer("full"), layer("window", sliding_window=64)
    chunk = layer("chunk", sliding_window=None, attention_chunk_size=32)
    assert attention.context_pages({"a": window, "b": full, "c": window, "d": chunk}) == "full"
    assert attention.context_pages({"a": full, "b": layer("last")}) == "last"
    assert attention.context_pages({"a": chunk, "b": window}) == "window"


def test_of_latents_there_are_no_keys_to_attend_to():
    with pytest.raises(ValueError, match="holds latents, and the method attends to keys"):
        CpuLatentCache.context_pages(None)
