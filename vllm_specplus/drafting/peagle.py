"""P-EAGLE: an EAGLE-3 head of several layers that drafts a block in one pass.

Rows of the text are those of EAGLE-3 (``eagle.py``): that of position ``i`` takes the target's
hidden states there and the token that came next, ``t_{i+1}``, and predicts ``t_{i+2}``. Behind the
last of them, that of the newest token, follow rows with nothing to go on from: a mask token and a
trained hidden state in the place of both. A row sees those before it. With the newest token at
``n``::

    rows      .., n - 2           n - 1          n                  n + 1, ..
    take      e(t_{n-1}), f'      e(t_n), f'     e(mask), f'(m)     the same
    predict   t_n                 t_{n+1}        t_{n+2}            t_{n+3}, ..

``f'`` fuses hidden states as in EAGLE-3, ``m`` is ``mask_hidden`` of the checkpoint. The first
layer reads ``[n e(t); n f']``; the others are plain layers of Llama or Qwen3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from vllm_specplus.drafting import block_trees
from vllm_specplus.drafting.block_config import BlockConfig, ParallelBody
from vllm_specplus.drafting.block_trees import Laws
from vllm_specplus.drafting.eagle import Vocabulary, fused
from vllm_specplus.drafting.passes import Attend
from vllm_specplus.drafting.transformers_layer import PASSED_IN

#: Family -> config, decoder layer, norm and rotary embedding, transformers' own.
_MODULES = {
    "llama": (LlamaConfig, LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "qwen3": (Qwen3Config, Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding),
}


class ParallelHead:
    """Weights on one device. All calls run without gradients."""

    predicts: int
    """Tokens of which it gives logits."""

    def __init__(
        self, config: BlockConfig, weights: dict[str, torch.Tensor], own: torch.Tensor | None,
        target: Vocabulary, device: torch.device, dtype: torch.dtype,
    ):  # fmt: skip
        """``weights`` by canonical names; ``own`` int64 [V']: the ids of the tokens that it
        predicts, None: all of them."""
        assert isinstance(config.body, ParallelBody)
        self.config, self.body = config, config.body
        self.device, self.dtype, self._target = device, dtype, target
        self._own = None if own is None else own.to(device)
        config_class, *_, rotary_class = _MODULES[self.body.family]
        layer = config_class(**self.body.layer, attn_implementation=PASSED_IN)
        self.attention_layers = list(range(layer.num_hidden_layers))
        self.kv_heads, self.head_dim = layer.num_key_value_heads, layer.head_dim
        self.max_positions = layer.max_position_embeddings
        masked = weights.pop("mask_hidden").reshape(1, -1).to(device, dtype)
        self.parts = _parts(self.body.family, layer, weights).to(dtype).to(device)
        self.parts.load_state_dict(weights)
        self.parts.eval().requires_grad_(False)
        self._rotary = rotary_class(layer).to(device)
        self.masked = self.fuse(masked)
        """f'(m) [1, hidden]: what masks take for f'."""

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """f' of the target's hidden states: [n, states * target_hidden] -> [n, hidden]."""
        return fused(self.parts, states)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, head_dim] at ``positions`` int64 [T]."""
        cos, sin = self._rotary(self.parts["fc"].weight, position_ids=positions[None])
        return cos[0], sin[0]

    def __call__(
        self, tokens: torch.Tensor, features: torch.Tensor, rotary: tuple, attend: Attend
    ) -> torch.Tensor:
        """Before the last norm, [T, hidden] of ``tokens`` int64 [T] and ``features`` [T, hidden],
        the f' of each row; ``attend`` also keeps the rows' keys and values."""
        first: Any
        first, *rest = self.parts["layers"]
        cos, sin = rotary
        given = {
            "attention_mask": None, "position_embeddings": (cos[None], sin[None]),
            "attend": attend, "window_of_layer": None,
        }  # fmt: skip
        normed = first.hidden_norm(features)
        residual = normed if self.body.norm_before_residual else features
        embedded = first.input_layernorm(self._embed(tokens).to(self.dtype))
        entering = torch.cat((embedded, normed), -1)[None]
        hidden = residual + first.self_attn(hidden_states=entering, **given)[0][0]
        hidden = hidden + first.mlp(first.post_attention_layernorm(hidden))
        for layer in rest:
            hidden = layer(hidden[None], **given)[0]
        return hidden

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in self.parts:
            return self.parts["embed_tokens"](tokens)
        return self._target.embed(tokens)

    def feature(self, hidden: torch.Tensor) -> torch.Tensor:
        """No row goes on from another's."""
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., own tokens]."""
        normed = self.parts["norm"](hidden)
        if "lm_head" in self.parts:
            return self.parts["lm_head"](normed).float()
        return self._target.output(normed)

    def laws(self, hidden: torch.Tensor, tokens: torch.Tensor, width: int) -> Laws:
        """Of blocks with ``hidden`` [R, D, hidden]; what the newest ``tokens`` are is in them."""
        return block_trees.factorised(self.logits(hidden), width, self._own)


def _parts(family: str, config: Any, weights: dict[str, torch.Tensor]) -> nn.ModuleDict:
    """The head's modules, transformers' own, without weights."""
    _, layer_class, norm_class, _ = _MODULES[family]
    hidden, eps = config.hidden_size, config.rms_norm_eps
    layers = [layer_class(config, i) for i in range(config.num_hidden_layers)]
    layers[0].hidden_norm = norm_class(hidden, eps)
    for name in ("q_proj", "k_proj", "v_proj"):
        old = getattr(layers[0].self_attn, name)
        new = nn.Linear(2 * hidden, old.out_features, bias=old.bias is not None)
        setattr(layers[0].self_attn, name, new)
    fc_out, fc_in = weights["fc.weight"].shape
    parts: dict[str, nn.Module] = {
        "fc": nn.Linear(fc_in, fc_out, bias=False), "norm": norm_class(hidden, eps),
        "layers": nn.ModuleList(layers),
    }  # fmt: skip
    if "input_norm.weight" in weights:
        parts["input_norm"] = norm_class(fc_in, eps)
    norms = [norm_class(len(w), eps) for name, w in weights.items() if name.startswith("fc_norm.")]
    if norms:
        parts["fc_norm"] = nn.ModuleList(norms)
    if "embed_tokens.weight" in weights:
        parts["embed_tokens"] = nn.Embedding(*weights["embed_tokens.weight"].shape)
    if "lm_head.weight" in weights:
        rows, columns = weights["lm_head.weight"].shape
        parts["lm_head"] = nn.Linear(columns, rows, bias=False)
    return nn.ModuleDict(parts)
