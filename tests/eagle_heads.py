"""Random EAGLE heads, written as their authors do, and their formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, DIM = 4, 2, 16
HIDDEN, MLP, EPS = 64, 96, 1e-5


def save_head(
    path: Path, generation: int, vocab: int, seed: int = 3, own_tokens: int | None = None,
    states: int = 3, hidden: int = HIDDEN, head_dim: int = DIM, spread: float = 0.2,
    bias: bool = True, **config,
) -> str:  # fmt: skip
    """A head in float32; ``config``: more keys, among them vLLM's variants of EAGLE-3."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    def scale(size: int = hidden) -> torch.Tensor:
        return 1 + weight(size)

    layer = "midlayer" if generation == 3 else "layers.0"
    reads = 2 * hidden if generation == 3 else hidden
    tensors = {
        f"{layer}.self_attn.q_proj.weight": weight(HEADS * head_dim, reads),
        f"{layer}.self_attn.k_proj.weight": weight(KV_HEADS * head_dim, reads),
        f"{layer}.self_attn.v_proj.weight": weight(KV_HEADS * head_dim, reads),
        f"{layer}.self_attn.o_proj.weight": weight(hidden, HEADS * head_dim),
        f"{layer}.mlp.gate_proj.weight": weight(MLP, hidden),
        f"{layer}.mlp.up_proj.weight": weight(MLP, hidden),
        f"{layer}.mlp.down_proj.weight": weight(hidden, MLP),
        f"{layer}.post_attention_layernorm.weight": scale(),
    }
    if generation == 3:
        tensors |= {
            f"{layer}.hidden_norm.weight": scale(),
            f"{layer}.input_layernorm.weight": scale(),
            "norm.weight": scale(),
            "fc.weight": weight(hidden, states * hidden),
        }
        if config.get("norm_before_fc"):
            tensors["input_norm.weight"] = scale(states * hidden)
        if config.get("fc_norm"):
            tensors |= {f"fc_norm.{i}.weight": scale(hidden) for i in range(states)}
    else:
        tensors["fc.weight"] = weight(hidden, 2 * hidden)
        if bias:  # vLLM's EAGLE has none
            tensors["fc.bias"] = weight(hidden)
    if own_tokens is not None:
        ids = torch.randperm(vocab, generator=generator)[:own_tokens].sort().values
        tensors["d2t"] = ids - torch.arange(own_tokens)
        tensors["t2d"] = torch.isin(torch.arange(vocab), ids)
        tensors["lm_head.weight"] = weight(own_tokens, hidden)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    name = "LlamaForCausalLMEagle3" if generation == 3 else "LlamaForCausalLM"
    described = {
        "architectures": [name], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": MLP, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim, "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": 10000.0,
        "num_hidden_layers": 1, "vocab_size": vocab, "max_position_embeddings": 1024,
        "draft_vocab_size": own_tokens or vocab, "tie_word_embeddings": False, **config,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(described))
    return str(path)


class Reference:
    """A head's formulas (``drafting/eagle.py``), one row after the other, with no cache."""

    def __init__(self, folder: str, embedding: torch.Tensor, output: torch.Tensor):
        """``embedding``, ``output`` [vocab, HIDDEN]: the target's."""
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.w = {
            name.replace("midlayer.", "").replace("layers.0.", ""): weight
            for name, weight in load_file(Path(folder) / "model.safetensors").items()
        }
        self.embedding, self.output = embedding, output
        self.third = "hidden_norm.weight" in self.w

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * self.w[f"{name}.weight"]

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        if not self.third:
            return states
        if "input_norm.weight" in self.w:
            states = self.norm(states, "input_norm")
        if "fc_norm.0.weight" in self.w:
            states = torch.cat(
                [self.norm(x, f"fc_norm.{i}") for i, x in enumerate(states.chunk(3))]
            )
        return self.w["fc.weight"] @ states

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """[heads, DIM]"""
        angle = position * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def __call__(
        self, text: list[int], states: torch.Tensor, path: list[int], seen: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [vocab] behind ``text`` and the nodes of ``path``.

        ``states`` [len(text) - 1, n * HIDDEN]: the target's, of all but the newest token;
        ``seen``: the only rows that the last one sees.
        """
        keys, values = [], []
        given = y = None
        for position, token in enumerate([*text[1:], *path]):
            if position < len(states):
                given = self.fuse(states[position])
            last = position == len(text) + len(path) - 2
            y = self.row(token, given, position, keys, values, seen if last else None)
            given = self.norm(y, "norm") if self.config.get("norm_output") else y
        if self.third:
            y = self.norm(y, "norm")
        if "lm_head.weight" not in self.w:
            return self.output @ y
        ids = torch.arange(len(self.w["d2t"])) + self.w["d2t"]
        return torch.full((len(self.embedding),), float("-inf")).index_put(
            (ids,), self.w["lm_head.weight"] @ y
        )

    def row(self, token, given, position, keys, values, only) -> torch.Tensor:
        embedded = self.embedding[token]
        if self.third:
            normed = self.norm(given, "hidden_norm")
            residual = normed if self.config.get("norm_before_residual") else given
            x = torch.cat((self.norm(embedded, "input_layernorm"), normed))
        else:
            x = residual = self.w["fc.weight"] @ torch.cat((embedded, given)) + self.w["fc.bias"]
        heads = {p: (self.w[f"self_attn.{p}_proj.weight"] @ x).view(-1, DIM) for p in "qkv"}
        keys.append(self.rotate(heads["k"], position))
        values.append(heads["v"])
        query = self.rotate(heads["q"], position)
        seen = [
            torch.stack(rows).repeat_interleave(HEADS // KV_HEADS, 1) for rows in (keys, values)
        ]
        if only is not None:
            seen = [rows[only] for rows in seen]
        weights = torch.einsum("hd,shd->hs", query, seen[0]).div(DIM**0.5).softmax(-1)
        attended = torch.einsum("hs,shd->hd", weights, seen[1]).flatten()
        b = residual + self.w["self_attn.o_proj.weight"] @ attended
        n = self.norm(b, "post_attention_layernorm")
        gate = torch.nn.functional.silu(self.w["mlp.gate_proj.weight"] @ n)
        return b + self.w["mlp.down_proj.weight"] @ (gate * (self.w["mlp.up_proj.weight"] @ n))
