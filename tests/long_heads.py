"""Random long drafts, written as LongSpec's authors do, and their formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, DIM = 4, 2, 16
HIDDEN, MLP, EPS, THETA = 64, 96, 1e-5, 10000.0
NORMS = ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm")


def save_long(
    path: Path, vocab: int, window: int = 20, seed: int = 3, hidden: int = HIDDEN,
    head_dim: int = DIM, spread: float = 0.2, bias: bool = True, last_norm: bool = True,
    **config,
) -> str:  # fmt: skip
    """A draft in float32. ``bias``: as the authors' for Qwen2, projections of keys and values that
    nothing reads among them; ``config``: more keys."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    rows = {"q": HEADS * head_dim, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim}
    tensors = {}
    for part in ("self_attn", "cross_attn"):
        for name, size in rows.items():
            if part == "cross_attn" and name != "q" and not bias:
                continue
            tensors[f"{part}.{name}_proj.weight"] = weight(size, hidden)
            if bias:
                tensors[f"{part}.{name}_proj.bias"] = weight(size)
        tensors[f"{part}.o_proj.weight"] = weight(hidden, HEADS * head_dim)
    tensors |= {
        "mlp.gate_proj.weight": weight(MLP, hidden),
        "mlp.up_proj.weight": weight(MLP, hidden),
        "mlp.down_proj.weight": weight(hidden, MLP),
    }
    norms = [*NORMS, "norm"] if last_norm else NORMS
    tensors |= {f"{name}.weight": 1 + weight(hidden) for name in norms}
    described = {
        "architectures": ["LlamaGlideDecoderLayer"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": MLP, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim, "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": THETA,
        "num_hidden_layers": 3, "vocab_size": vocab, "max_position_embeddings": 1024,
        "draft_window": window,
    }  # fmt: skip
    return write(path, tensors, described | config)


def write(path: Path, tensors: dict[str, torch.Tensor], config: dict) -> str:
    """The folder of a draft of these."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """[heads, DIM]"""
    angle = position * THETA ** (-torch.arange(0, DIM, 2) / DIM)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[HEADS * DIM] of ``query`` [HEADS, DIM] over [S, KV_HEADS, DIM] each."""
    keys, values = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (keys, values))
    weights = torch.einsum("hd,shd->hs", query, keys).div(DIM**0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values).flatten()


class Reference:
    """A draft's formulas (``drafting/long_draft.py``), one row after the other, with no cache."""

    def __init__(self, folder: str, embedding: torch.Tensor, output: torch.Tensor):
        """``embedding``, ``output`` [vocab, HIDDEN]: the target's."""
        self.window = json.loads((Path(folder) / "config.json").read_text())["draft_window"]
        self.w = load_file(Path(folder) / "model.safetensors")
        self.embedding, self.output = embedding, output

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * self.w[f"{name}.weight"]

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.w.get(f"{name}.bias")
        out = self.w[f"{name}.weight"] @ x
        return out if bias is None else out + bias

    def __call__(
        self, text: list[int], path: list[int], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Logits [vocab] behind ``text`` and the nodes of ``path``. ``keys``, ``values``
        [len(text) - 1, KV_HEADS, DIM]: the target's of all but the newest token."""
        tokens = [*text, *path]
        own = len(tokens) - 1
        seen = range(max(own - self.window, 0), own + 1)
        read = [self.norm(self.embedding[tokens[i]], NORMS[0]) for i in seen]
        own_keys, own_values = (
            torch.stack([self.project(x, f"self_attn.{p}_proj").view(-1, DIM) for x in read])
            for p in "kv"
        )
        rotated = torch.stack([rotate(k, i) for k, i in zip(own_keys, seen, strict=True)])
        query = rotate(self.project(read[-1], "self_attn.q_proj").view(-1, DIM), own)
        x = self.embedding[tokens[own]]
        x = x + self.project(attention(query, rotated, own_values), "self_attn.o_proj")
        query = self.project(self.norm(x, NORMS[1]), "cross_attn.q_proj").view(-1, DIM)
        x = x + self.project(attention(rotate(query, own), keys, values), "cross_attn.o_proj")
        n = self.norm(x, NORMS[2])
        gate = torch.nn.functional.silu(self.project(n, "mlp.gate_proj"))
        x = x + self.project(gate * self.project(n, "mlp.up_proj"), "mlp.down_proj")
        return self.output @ (self.norm(x, "norm") if "norm.weight" in self.w else x)
