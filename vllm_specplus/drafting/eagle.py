"""EAGLE heads: one layer that goes on from the target's hidden states.

The row of position ``i`` takes what the target computed there, ``f_i``, and the token that
came *next*, ``t_{i+1}``; it predicts ``t_{i+2}``. Behind the text the target has computed
nothing: there a row takes, for ``f``, what the head gave in the row of its parent. With
attention ``A``, MLP ``M``, the target's embedding ``e`` and norms ``n``:

EAGLE (arXiv 2401.15077; EAGLE-2 has the same head)::

    x = W [e(t); f]      b = x + A(x)                 y = b + M(n b)    logits  U y

    f: behind the target's last norm;  U: the target's output layer

EAGLE-3 (arXiv 2503.01840)::

    f' = W [f_1; f_2; f_3]   b = f' + A([n e(t); n f'])   y = b + M(n b)    logits  U' n y

    f_i: behind three of the target's layers, of nodes f' = y;  U': its own, of fewer tokens

Read from the checkpoints their authors, SGLang and ``speculators`` write, with the variants
that vLLM's ``llama_eagle3`` knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from vllm_specplus.drafting.eagle_checkpoint import HeadConfig, canonical, read_config
from vllm_specplus.drafting.passes import Attend
from vllm_specplus.drafting.transformers_layer import PASSED_IN


class Vocabulary(Protocol):
    """The target's embedding and output layer."""

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden]."""

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """[..., hidden], behind the last norm -> float32 logits [..., vocab]."""


class EagleHead:
    """Weights on one device. All calls run without gradients."""

    attention_layers = (0,)

    def __init__(
        self, folder: str, target: Vocabulary, vocab_size: int, device: torch.device,
        dtype: torch.dtype,
    ):  # fmt: skip
        self.config = head = read_config(folder)
        self.device, self.dtype, self.vocab_size = device, dtype, vocab_size
        self._target = target
        layer = LlamaConfig(**head.layer, num_hidden_layers=1, attn_implementation=PASSED_IN)
        self.kv_heads = layer.num_key_value_heads
        self.head_dim, self.max_positions = layer.head_dim, layer.max_position_embeddings
        weights = {
            canonical(name): weight
            for file in sorted(Path(folder).glob("*.safetensors"))
            for name, weight in load_file(file).items()
        }
        offsets = weights.pop("d2t", None)
        for name in ("t2d", "layer.self_attn.rotary_emb.inv_freq"):  # follow from the others
            weights.pop(name, None)
        self._tokens = None
        """int64 [own tokens] their ids, of a head that predicts some of them only."""
        if offsets is not None:
            self._tokens = (torch.arange(len(offsets)) + offsets).to(device)
        self.parts = _parts(layer, head, weights).to(dtype).to(device)
        """The modules, by the first part of their tensors' canonical names."""
        self.parts.load_state_dict(weights)
        self.parts.eval().requires_grad_(False)
        self._rotary = LlamaRotaryEmbedding(layer).to(device)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """f' of the target's hidden states: [n, states * target_hidden] -> [n, hidden]."""
        return states if self.config.generation == 1 else fused(self.parts, states)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, head_dim] at ``positions`` int64 [T]."""
        cos, sin = self._rotary(self.parts["fc"].weight, position_ids=positions[None])
        return cos[0], sin[0]

    def __call__(
        self, tokens: torch.Tensor, features: torch.Tensor, rotary: tuple, attend: Attend
    ) -> torch.Tensor:
        """y [T, hidden].

        ``tokens`` int64 [T]; ``features`` [T, hidden] f' (or f) of each row; ``attend`` also keeps
        the rows' keys and values.
        """
        parts, layer = self.parts, self.parts["layer"]
        embedded = self._embed(tokens).to(self.dtype)
        if self.config.generation == 1:
            residual = entering = parts["fc"](torch.cat((embedded, features), -1))
        else:
            normed = layer["hidden_norm"](features)
            residual = normed if self.config.norm_before_residual else features
            entering = torch.cat((layer["input_layernorm"](embedded), normed), -1)
        cos, sin = rotary
        attended = layer["self_attn"](
            hidden_states=entering[None],
            position_embeddings=(cos[None], sin[None]),
            attention_mask=None,
            attend=attend,
            window_of_layer=None,
        )[0][0]
        hidden = residual + attended
        return hidden + layer["mlp"](layer["post_attention_layernorm"](hidden))

    def feature(self, y: torch.Tensor) -> torch.Tensor:
        """What the rows below take for f'."""
        return self.parts["norm"](y) if self.config.norm_output else y

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]; tokens the head does not know: -inf."""
        parts = self.parts
        if self.config.generation == 3:
            y = parts["norm"](y)
        if "lm_head" not in parts:
            return self._target.output(y)
        own = parts["lm_head"](y).float()
        if self._tokens is None:
            return own
        everything = own.new_full((*own.shape[:-1], self.vocab_size), float("-inf"))
        everything[..., self._tokens] = own
        return everything

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in self.parts:
            return self.parts["embed_tokens"](tokens)
        return self._target.embed(tokens)


def fused(parts: nn.ModuleDict, states: torch.Tensor) -> torch.Tensor:
    """f' [n, hidden] of hidden states [n, states * target_hidden], by the ``parts`` of an EAGLE-3
    head: ``fc``, and the norms before it that the head has."""
    if "input_norm" in parts:
        states = parts["input_norm"](states)
    if "fc_norm" in parts:
        norms = list(parts["fc_norm"])
        each = states.chunk(len(norms), -1)
        states = torch.cat([norm(x) for norm, x in zip(norms, each, strict=True)], -1)
    return parts["fc"](states)


def _parts(layer: LlamaConfig, head: HeadConfig, weights: dict[str, torch.Tensor]) -> nn.ModuleDict:
    """The head's modules, transformers' own, without weights."""
    hidden, eps = head.hidden_size, layer.rms_norm_eps
    attention = LlamaAttention(layer, layer_idx=0)
    block = {
        "self_attn": attention,
        "mlp": LlamaMLP(layer),
        "post_attention_layernorm": LlamaRMSNorm(hidden, eps),
    }
    fc_out, fc_in = weights["fc.weight"].shape
    parts = {"fc": nn.Linear(fc_in, fc_out, bias="fc.bias" in weights)}
    if head.generation == 3:
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(attention, name)
            new = nn.Linear(2 * hidden, old.out_features, bias=old.bias is not None)
            setattr(attention, name, new)
        block |= {name: LlamaRMSNorm(hidden, eps) for name in ("hidden_norm", "input_layernorm")}
        parts["norm"] = LlamaRMSNorm(hidden, eps)
        if "input_norm.weight" in weights:
            parts["input_norm"] = LlamaRMSNorm(fc_in, eps)
        if "fc_norm.0.weight" in weights:
            size = fc_in // head.states
            parts["fc_norm"] = nn.ModuleList(LlamaRMSNorm(size, eps) for _ in range(head.states))
    for name in ("lm_head", "embed_tokens"):
        if f"{name}.weight" in weights:
            rows, columns = weights[f"{name}.weight"].shape
            parts[name] = (
                nn.Linear(columns, rows, bias=False)
                if name == "lm_head"
                else nn.Embedding(rows, columns)
            )
    return nn.ModuleDict(parts | {"layer": nn.ModuleDict(block)})
