"""LlamaGen (arXiv 2406.06525): a condition, then a picture's codes in raster order.

This is the plain model: what is trained, and what the engine's
(``engine/models/llamagen.py``) has to equal. Parameters carry the names of the public
checkpoints.

A Llama with a rotary embedding of two dimensions, half of each head's pairs turned by the
code's row and half by its column. The condition is a class label, one position, or a caption,
one position for each state of its text encoder. These positions are not turned but zeroed:
query and key are 0, so that they average the values before them, and every later position
looks at their values with the same weight.

Classifier-free guidance compares with the condition "any": a label of its own,
``num_classes``, or learnt states. Captions are padded on the left in the original, up to
``caption_tokens``, and the padding is masked. Since nothing in a caption depends on its
position, a caption without padding is the same, beside the *last* of the states for "any".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

MODEL_TYPE = "llamagen"
ARCHITECTURE = "LlamaGenForClassToImage"
TEXT_ARCHITECTURE = "LlamaGenForTextToImage"

#: Parameters of the conditions in a checkpoint: of labels, of captions, and what projects these.
LABELS = "cls_embedding.embedding_table.weight"
UNCONDITIONAL = "cls_embedding.uncond_embedding"
PROJECTION = ("cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight")


class LlamaGenConfig(PretrainedConfig):
    """As Hugging Face's tools and vLLM read it. Token ids: codes, then class labels, then
    the label for "any", which stands for every position of a caption in models of text."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        num_classes: int = 1000,
        grid_size: int = 16,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        guidance_scale: float | None = 4.0,
        caption_size: int | None = None,
        caption_tokens: int = 120,
        **kwargs,
    ):
        """``guidance_scale``: of requests that name none; None: the model is served without
        guidance, at half the cost. ``caption_size``: width of the text encoder's states, None
        for a model of classes; ``caption_tokens``: most of them."""
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.num_classes = num_classes
        self.grid_size = grid_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.rope_base = rope_base
        self.guidance_scale = guidance_scale
        self.caption_size = caption_size
        self.caption_tokens = caption_tokens
        of_text = caption_size is not None
        self.max_position_embeddings = (caption_tokens if of_text else 1) + grid_size**2
        self.vocab_size = codebook_size + num_classes + 1
        architecture = TEXT_ARCHITECTURE if of_text else ARCHITECTURE
        kwargs = {"architectures": [architecture], "tie_word_embeddings": False} | kwargs
        super().__init__(**{k: v for k, v in kwargs.items() if k not in self._derived})

    _derived = ("max_position_embeddings", "vocab_size")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def label_token(self, label: int) -> int:
        """Token id of a class, or of "any" (``num_classes``)."""
        return self.codebook_size + label


def rotary_2d(config: LlamaGenConfig) -> torch.Tensor:
    """float32 [1 + codes, head_dim / 2, 2]: cosine and sine by position in the picture, behind
    0 for its condition."""
    half = config.head_dim // 2
    frequency = config.rope_base ** -(torch.arange(0, half, 2).float() / half)
    angle = torch.outer(torch.arange(config.grid_size).float(), frequency)
    size = config.grid_size
    row = angle[:, None].expand(size, size, -1)
    column = angle[None].expand(size, size, -1)
    angles = torch.cat((row, column), -1).flatten(0, 1)
    turned = torch.stack((angles.cos(), angles.sin()), -1)
    return torch.cat((torch.zeros(1, *turned.shape[1:]), turned))


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (2i, 2i + 1) of ``x`` [n, heads, head_dim] by ``turn``
    [n, head_dim / 2, 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turn[:, None].unbind(-1)
    pairs = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1)
    return pairs.flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.heads = (config.num_attention_heads, *(config.num_key_value_heads,) * 2)
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.wqkv(x).view(batch, length, -1, self.head_dim).split(self.heads, dim=2)
        turn = turn.repeat(batch, 1, 1)
        q, k = (rotate(part.flatten(0, 1), turn).view_as(part) for part in qkv[:2])
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), qkv[2].transpose(1, 2),
            is_causal=True, enable_gqa=self.heads[0] != self.heads[1],
        )  # fmt: skip
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, turn: torch.Tensor, drop: float) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), turn), drop, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), drop, self.training)


class LabelEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """int64 [B] -> [B, 1, hidden]."""
        return self.embedding_table(labels)[:, None]

    def anything(self, labels: torch.Tensor) -> torch.Tensor:
        """What guidance compares ``labels`` with."""
        return torch.full_like(labels, self.embedding_table.num_embeddings - 1)


def project(states: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """States of a caption, [..., caption_size], as embeddings [..., hidden], by the weights of
    ``PROJECTION``."""
    return F.linear(F.gelu(F.linear(states, first), approximate="tanh"), second)


class CaptionProjection(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.caption_size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return project(states, self.fc1.weight, self.fc2.weight)


class CaptionEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.uncond_embedding = nn.Parameter(
            torch.randn(config.caption_tokens, config.caption_size) / config.caption_size**0.5
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., n, caption_size] -> [..., n, hidden]."""
        return self.cap_proj(states)

    def anything(self, states: torch.Tensor) -> torch.Tensor:
        """What guidance compares ``states`` with."""
        return self.uncond_embedding[-states.shape[-2] :].expand_as(states)


class LlamaGen(nn.Module):
    def __init__(self, config: LlamaGenConfig, dropout: float = 0.0):
        super().__init__()
        self.config, self.dropout = config, dropout
        kind = LabelEmbedding if config.caption_size is None else CaptionEmbedding
        self.cls_embedding = kind(config)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.register_buffer("turn", rotary_2d(config), persistent=False)

    def forward(self, codes: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """Logits [B, n + 1, codebook] of the code after the condition and after each of ``codes``
        int64 [B, n]; ``conditions``: labels int64 [B], or captions float [B, m, caption_size]."""
        before = self.cls_embedding(conditions)
        x = torch.cat((before, self.tok_embeddings(codes)), 1)
        x = F.dropout(x, self.dropout, self.training)
        position = torch.arange(x.shape[1], device=x.device) - (before.shape[1] - 1)
        turn = self.turn[position.clamp(min=0)]
        for layer in self.layers:
            x = layer(x, turn, self.dropout)
        return self.output(self.norm(x[:, before.shape[1] - 1 :])).float()

    def guided(self, codes: torch.Tensor, conditions: torch.Tensor, scale: float) -> torch.Tensor:
        """Logits with classifier-free guidance: any + scale (condition - any)."""
        anything = self.cls_embedding.anything(conditions)
        both = self(torch.cat((codes, codes)), torch.cat((conditions, anything)))
        given, other = both.chunk(2)
        return other + scale * (given - other)


def config_of(weights: dict[str, torch.Tensor], heads: int, grid_size: int) -> LlamaGenConfig:
    """Of a checkpoint; ``heads`` cannot be read off its tensors. Guidance is what the reference
    code draws with."""
    codes, hidden = weights["tok_embeddings.weight"].shape
    rows = weights["layers.0.attention.wqkv.weight"].shape[0] // (hidden // heads)
    if UNCONDITIONAL in weights:
        tokens, size = weights[UNCONDITIONAL].shape
        given = {"caption_tokens": tokens, "caption_size": size, "guidance_scale": 7.5}
    else:
        given = {"num_classes": len(weights[LABELS]) - 1}
    return LlamaGenConfig(
        **({"num_classes": 0} | given),
        codebook_size=codes,
        grid_size=grid_size,
        hidden_size=hidden,
        intermediate_size=len(weights["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=1 + max(int(n.split(".")[1]) for n in weights if n.startswith("layers.")),
        num_attention_heads=heads,
        num_key_value_heads=(rows - heads) // 2,
    )


def reference_sampling(config: LlamaGenConfig) -> dict[str, Any]:
    """What the public checkpoints' sample scripts draw with, as ``generation_config.json``."""
    top_k = 2000 if config.caption_size is None else 1000
    return {"do_sample": True, "temperature": 1.0, "top_k": top_k, "top_p": 1.0}


def save(
    folder: Path, weights: dict[str, torch.Tensor], config: LlamaGenConfig,
    sampling: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a folder that vLLM serves; ``weights`` include the VQ model's ``codebook``.
    ``sampling`` is of requests that name none; None: nothing is cut off."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    if sampling is not None:
        (folder / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n")
