"""The target's own layers, offered as a draft model (self-speculation).

The modules are vLLM's, with the target's weights, quantised or not. Only their attention is
another one: it reads and writes the draft's cache.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import VllmConfig

from vllm_specplus.drafting.cache import PagedCache


class _DraftAttention(nn.Module):
    """Stands where vLLM's ``Attention`` stood: same call, the draft's cache."""

    def __init__(self, layer: int, num_heads: int, kv_heads: int, head_dim: int, scale: float):
        super().__init__()
        self._layer, self._scale = layer, scale
        self._heads, self._kv_heads, self._head_dim = num_heads, kv_heads, head_dim
        self.cache: PagedCache | None = None
        self.mask: torch.Tensor | None = None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """[rows, heads * head_dim] each; the rows of ``mask`` bool [R, 1, n, slots]."""
        requests, _, width, _ = self.mask.shape

        def by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
            return rows.view(requests, width, heads, self._head_dim).transpose(1, 2)

        keys, values = self.cache.update(
            by_head(key, self._kv_heads), by_head(value, self._kv_heads), self._layer
        )
        on_gpu = query.device.type == "cuda"
        if on_gpu:  # with a mask and fewer KV heads, only the slow reference kernel would run
            group = self._heads // self._kv_heads
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        out = scaled_dot_product_attention(
            by_head(query, self._heads), keys, values,
            attn_mask=self.mask, scale=self._scale, enable_gqa=not on_gpu,
        )  # fmt: skip
        return out.transpose(1, 2).reshape(requests * width, -1)


class TargetLayers:
    """What ``drafting.executor`` asks of a draft model, from the loaded target.

    For the families of ``drafting.model.FAMILIES`` on one rank; the plugin refuses others.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig):
        config = vllm_config.model_config
        self._model, self._inner = model, model.model
        self._layers = list(self._inner.layers)
        self.num_layers = len(self._layers)
        self.attention_layers = list(range(self.num_layers))
        self.device, self.dtype = next(model.parameters()).device, config.dtype
        self.kv_heads = config.get_num_kv_heads(vllm_config.parallel_config)
        self.head_dim = config.get_head_size()
        self.max_positions = config.max_model_len
        self.vocab_size = config.get_vocab_size()
        self._attentions = []
        for number, block in enumerate(self._layers):
            # A twin of the module: the same projections and norms, another attention.
            twin = copy.copy(block.self_attn)
            twin._modules = dict(block.self_attn._modules)
            twin.attn = _DraftAttention(
                number, twin.num_heads, self.kv_heads, self.head_dim, twin.scaling
            )
            self._attentions.append(twin)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, n] -> [R, n, hidden]."""
        return self._inner.embed_input_ids(tokens.flatten()).view(*tokens.shape, -1)

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """vLLM's attention takes the positions, int64 [R * n]."""
        return positions.flatten()

    def attention(
        self, layer: int, hidden: torch.Tensor, rotary: torch.Tensor, mask: torch.Tensor,
        cache: PagedCache,
    ) -> torch.Tensor:  # fmt: skip
        """As ``DraftModel.attention``."""
        twin = self._attentions[layer]
        twin.attn.cache, twin.attn.mask = cache, mask
        normed = self._layers[layer].input_layernorm(hidden.flatten(0, 1))
        return twin(positions=rotary, hidden_states=normed).view_as(hidden)

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """As ``DraftModel.mlp``."""
        block = self._layers[layer]
        return block.mlp(block.post_attention_layernorm(hidden.flatten(0, 1))).view_as(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]."""
        return self.output(self._inner.norm(hidden.flatten(0, -2))).view(*hidden.shape[:-1], -1)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """The output layer alone: [..., hidden] -> float32 [..., vocab_size]."""
        rows = normed.flatten(0, -2)
        return self._model.compute_logits(rows).float().view(*normed.shape[:-1], -1)
