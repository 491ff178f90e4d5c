"""A draft's layer on the CPU with next to nothing beside its matrix products.

Levels have a few rows, of which transformers' modules make some forty small tensors per layer, and
that takes about as long as reading a small layer's weights. Layers of Llama's kind run here with
the projections of one input joined, and norms and rotary positions by the C++ kernels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear, silu

from vllm_specplus.drafting.transformers_layer import Given, TransformersLayer
from vllm_specplus.kernels import native

#: Classes of transformers' that compute the same as Llama's.
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")


def joined(*parts: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of projections of the same input as one. The parts' own become views of it:
    memory holds them once."""
    sizes = [part.out_features for part in parts]
    weight = torch.cat([part.weight for part in parts])
    for part, rows in zip(parts, weight.split(sizes), strict=True):
        part.weight = nn.Parameter(rows, requires_grad=False)
    if parts[0].bias is None:
        return weight, None
    return weight, torch.cat([part.bias for part in parts])


class LeanNorm:
    """What a norm of Llama's computes."""

    def __init__(self, norm: nn.Module):
        self._weight, self._eps = norm.weight, norm.variance_epsilon

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, hidden], normed."""
        return native.rms_norm(rows.contiguous(), self._weight, self._eps)


class LeanLayer:
    """What a :class:`TransformersLayer` of Llama's kind computes, or what is here of it."""

    def __init__(self, layer: TransformersLayer):
        """Take over ``layer``, whose norms have their places; see :func:`is_lean`."""
        before, _, between, _ = layer.placed
        if layer.attention is not None:
            self._take_attention(layer, layer.attention, before)
        if layer.mlp is not None:
            self._between = LeanNorm(between)
            self._gate_up, _ = joined(layer.mlp.gate_proj, layer.mlp.up_proj)
            self._down = layer.mlp.down_proj

    def _take_attention(
        self, layer: TransformersLayer, attention: nn.Module, norm: nn.Module
    ) -> None:
        self._before = LeanNorm(norm)
        self._number, self._scale = attention.layer_idx, attention.scaling
        self._window, self._size = layer.window or 0, attention.head_dim
        self._qkv, self._qkv_bias = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads = [
            part.out_features // self._size
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        self._out = attention.o_proj

    def attend(self, rows: torch.Tensor, given: Given) -> torch.Tensor:
        """Return A(x) of ``rows`` x [T, hidden]."""
        projected = linear(self._before(rows), self._qkv, self._qkv_bias)
        heads = projected.unflatten(1, (-1, self._size))
        native.rotate(heads[:, : sum(self._heads[:2])], *given.rotary)
        query, keys, values = heads.split(self._heads, 1)
        out = given.attend(self._number, query, keys, values, self._scale, self._window)
        return linear(out.flatten(1), self._out.weight, self._out.bias)

    def feed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return M(x) of ``rows`` x [T, hidden]."""
        gate, up = linear(self._between(rows), self._gate_up).chunk(2, 1)
        return linear(silu(gate).mul_(up), self._down.weight)

    # Nothing comes behind its parts.
    mixed, transformed = attend, feed

    def behind_mix(self, out: torch.Tensor) -> torch.Tensor:
        """As ``LayerParts.behind_mix``."""
        return out

    behind_transform = behind_mix


def is_lean(layer: TransformersLayer) -> bool:
    """Can a :class:`LeanLayer` take over ``layer``?"""
    before, behind, between, last = layer.placed
    attention, mlp = layer.attention, layer.mlp
    if behind is not None or last is not None or attention is mlp is None:
        return False
    lean_attention = is_lean_norm(before) and type(attention).__name__ in ATTENTIONS
    lean_mlp = (
        is_lean_norm(between)
        and type(mlp).__name__ in MLPS
        and mlp.config.hidden_act == "silu"
        and mlp.gate_proj.bias is mlp.up_proj.bias is mlp.down_proj.bias is None
    )
    return (attention is None or lean_attention) and (mlp is None or lean_mlp)


def is_lean_norm(norm: nn.Module | None) -> bool:
    """Can a :class:`LeanNorm` take over ``norm``?"""
    if type(norm).__name__ not in NORMS or native.library() is None:
        return False
    return norm.weight.device.type == "cpu" and norm.weight.dtype in native.DTYPES
