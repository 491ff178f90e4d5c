"""Attention back ends that verify draft trees, by device.

What another back end has to bring is in ``docs/adding_an_attention_backend.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_specplus.engine.attention.base import PageCache, attach, chunk_of, ours

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    from vllm_specplus.capabilities import Need
    from vllm_specplus.drafting.context_pages import ContextPages

__all__ = [
    "BACKENDS",
    "attach",
    "cached_layers",
    "context_pages",
    "forget_weights",
    "ours",
    "page_caches",
    "refusal",
    "register",
    "supports",
    "warm_up",
]

#: By device type and vLLM's name of the back end: our class, imported only when it is used.
BACKENDS = {
    "cpu": {
        "CPU_ATTN": "vllm_specplus.engine.attention.cpu.TreeCPUBackend",
        "CPU_MLA": "vllm_specplus.engine.attention.cpu_latent.TreeCPULatentBackend",
    },
    "cuda": {
        "FLASH_ATTN": "vllm_specplus.engine.attention.flash.TreeFlashAttentionBackend",
        "TRITON_ATTN": "vllm_specplus.engine.attention.triton.TreeTritonBackend",
        "TRITON_MLA": "vllm_specplus.engine.attention.triton_latent.TreeTritonLatentBackend",
    },
}


def register(device_type: str) -> None:
    """Let our back ends stand in for the stock ones of their names; called in workers only."""
    for name, path in BACKENDS[device_type].items():
        register_backend(AttentionBackendEnum[name], path)


def refusal(name: str, layer: Any) -> str | None:
    """Say in one sentence why the layer ``name`` verifies no draft trees, or None if it does."""
    if ours(layer):
        return None
    backend = layer.get_attn_backend()
    names = " or ".join(sorted({each for backends in BACKENDS.values() for each in backends}))
    return (
        f"layer {name!r} uses the attention back end {backend.get_name()} "
        f"({backend.__qualname__}), which verifies no draft trees: choose {names} by "
        f"--attention-backend, or serve the model without vllm-specplus"
    )


def supports(layer: Any) -> frozenset[Need]:
    """Return the needs that a layer's back end serves: none if it is not ours."""
    return layer.get_attn_backend().supports if ours(layer) else frozenset()


def cached_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the loaded layers that have a cache bound to them, by name, in the model's order.

    They are what verifies drafts. Encoders' layers have none.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return {name: layer for name, layer in layers.items() if _has_cache(layer)}


def _has_cache(layer: Any) -> bool:
    cache = getattr(layer, "kv_cache", None)
    return cache.numel() > 0 if isinstance(cache, torch.Tensor) else bool(cache)


def page_caches(layers: Mapping[str, Any], groups: Sequence[KVCacheGroupSpec]) -> list[PageCache]:
    """Return the KV caches of each of vLLM's ``groups`` of layers, in the layers' order; ``layers``
    are as of :func:`cached_layers`."""
    caches = []
    for group in groups:
        members = set(group.layer_names)
        caches.append(page_cache({name: each for name, each in layers.items() if name in members}))
    return caches


def page_cache(layers: Mapping[str, Any]) -> PageCache:
    """Return the KV caches of layers that have the same pages, in their order.

    Raises ValueError if the back end of one is not ours, if its cache has another shape than that
    back end expects, or if back ends that lay out their pages differently are mixed.
    """
    for name, layer in layers.items():
        if (sentence := refusal(name, layer)) is not None:
            raise ValueError(sentence)
        if not layer.get_attn_backend().page_cache.fits(layer):
            raise ValueError(
                f"vllm-specplus needs keys and values of one size side by side, or one latent for "
                f"both, not a KV cache of shape {tuple(layer.kv_cache.shape)} for head size "
                f"{layer.impl.head_size}, as layer {name!r} has"
            )
    kinds = {layer.get_attn_backend().page_cache for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"vllm-specplus needs one layout of KV cache pages, not "
            f"{sorted(kind.__qualname__ for kind in kinds)}"
        )
    return kinds.pop()(list(layers.values()))


def context_pages(layers: Mapping[str, Any]) -> ContextPages:
    """Return the pages of the last layer whose rows see all of their texts, or the last one where
    no layer has such rows; ``layers`` are as of :func:`cached_layers`.

    Raises DraftModelError if a draft cannot attend to them.
    """
    full = [
        layer
        for layer in layers.values()
        if not (getattr(layer, "sliding_window", None) or chunk_of(layer))
    ]
    last = (full or list(layers.values()))[-1]
    return last.get_attn_backend().page_cache.context_pages(last)


def forget_weights(layers: Mapping[str, Any]) -> None:
    """Let the layers take anew what they have copied of their weights, which are others now."""
    for layer in layers.values():
        if ours(layer):
            layer.impl.forget_weights()


def warm_up(
    layers: Mapping[str, Any], caches: Sequence[PageCache], dtype: torch.dtype, rows: int
) -> None:
    """Compile or load what the first requests would wait for, after load.

    ``layers`` and ``caches`` as in :func:`page_caches`; ``dtype`` is the model's and ``rows`` the
    most rows of a tree. Layers that run the same kernels are warmed up once.
    """
    for cache in caches:
        cache.warm_up()
    seen = set()
    for layer in layers.values():
        cache = layer.kv_cache
        key = (type(layer.impl), layer.impl.num_heads, cache.shape[1:], cache.stride(),
               layer.impl.features(layer))  # fmt: skip
        if key not in seen:
            seen.add(key)
            layer.impl.warm_up(layer, dtype, rows)
