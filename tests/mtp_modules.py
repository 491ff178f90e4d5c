"""Random MTP modules, as checkpoints of targets hold them, and their formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, DIM = 4, 2, 16
HIDDEN, MLP, EPS, THETA = 64, 96, 1e-5, 10000.0
EXPERTS, EXPERT_MLP, CHOSEN, SCALING = 4, 48, 2, 1.7
LAYERS = 3
"""Of the target."""
NAMES = {
    "mimo": {
        "enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj",
        "norm": "final_layernorm",
    },
    "glm4_moe": {"norm": "shared_head.norm", "lm_head": "shared_head.head"},
}  # fmt: skip


def module_tensors(
    family: str, experts: bool = False, bias: bool = False, qk_norm: bool = False,
    hidden: int = HIDDEN, head_dim: int = DIM, spread: float = 0.2, seed: int = 3,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Float32 weights by short names."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    def mlp(name: str, inner: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.gate_proj.weight": weight(inner, hidden),
            f"{name}.up_proj.weight": weight(inner, hidden),
            f"{name}.down_proj.weight": weight(hidden, inner),
        }

    norms = ("enorm", "hnorm", "norm", "input_layernorm", "post_attention_layernorm")
    tensors = {f"{name}.weight": 1 + weight(hidden) for name in norms}
    tensors["eh_proj.weight"] = weight(hidden, 2 * hidden)
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        tensors[f"self_attn.{part}_proj.weight"] = weight(heads * head_dim, hidden)
        if bias or family == "mimo":
            tensors[f"self_attn.{part}_proj.bias"] = weight(heads * head_dim)
    tensors["self_attn.o_proj.weight"] = weight(hidden, HEADS * head_dim)
    if qk_norm:
        tensors |= {f"self_attn.{part}_norm.weight": 1 + weight(head_dim) for part in "qk"}
    if not experts:
        return tensors | mlp("mlp", MLP)
    tensors["mlp.gate.weight"] = weight(EXPERTS, hidden)
    tensors["mlp.gate.e_score_correction_bias"] = weight(EXPERTS)
    for i in range(EXPERTS):
        tensors |= mlp(f"mlp.experts.{i}", EXPERT_MLP)
    return tensors | mlp("mlp.shared_experts", EXPERT_MLP)


def in_checkpoint(
    family: str, tensors: dict[str, torch.Tensor], layers: int = LAYERS
) -> dict[str, torch.Tensor]:
    """The same by the names that a target of so many layers has for them."""
    prefix = "model.mtp_layers.0" if family == "mimo" else f"model.layers.{layers}"
    found = {}
    for name, tensor in tensors.items():
        part, _, kind = name.rpartition(".")
        found[f"{prefix}.{NAMES[family].get(part, part)}.{kind}"] = tensor.contiguous()
    return found


def save_module(path: Path, family: str, vocab: int, experts: bool = False, **config) -> str:
    """A folder with some tensors of the target, in one file, and a random module in another;
    ``config``: more keys, or others."""
    bias, qk_norm = (bool(config.get(key)) for key in ("attention_bias", "use_qk_norm"))
    tensors = in_checkpoint(family, module_tensors(family, experts, bias, qk_norm))
    rest = {
        "model.embed_tokens.weight": torch.zeros(vocab, HIDDEN),
        "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.zeros(vocab, HIDDEN),
    }
    if family == "glm4_moe":  # copies, which nobody reads
        for name in ("embed_tokens", "shared_head.head"):
            tensors[f"model.layers.{LAYERS}.{name}.weight"] = torch.zeros(vocab, HIDDEN)
    path.mkdir(parents=True, exist_ok=True)
    save_file(rest, path / "model-00001-of-00002.safetensors")
    save_file(tensors, path / "model-00002-of-00002.safetensors")
    described = describe(family, vocab, experts) | config
    described = {key: value for key, value in described.items() if value is not None}
    (path / "config.json").write_text(json.dumps(described))
    return str(path)


def describe(family: str, vocab: int, experts: bool) -> dict:
    """The target's config."""
    config = {
        "hidden_size": HIDDEN, "intermediate_size": MLP, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": DIM, "hidden_act": "silu",
        "rms_norm_eps": EPS, "rope_theta": THETA, "num_hidden_layers": LAYERS, "vocab_size": vocab,
        "max_position_embeddings": 1024, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    if family == "mimo":
        return config | {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    config |= {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}
    config["partial_rotary_factor"] = 0.5
    if experts:
        config |= {
            "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "n_shared_experts": 1,
            "moe_intermediate_size": EXPERT_MLP, "routed_scaling_factor": SCALING, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": True,
        }  # fmt: skip
    return config


class Reference:
    """A module's formulas (``drafting/mtp.py``), one row after the other, with no cache."""

    def __init__(self, folder: str, embedding: torch.Tensor, output: torch.Tensor):
        """``embedding``, ``output`` [vocab, HIDDEN]: the target's."""
        weights = load_file(Path(folder) / "model-00002-of-00002.safetensors")
        self.mimo = any("mtp_layers" in name for name in weights)
        short = {long: name for name, long in NAMES["mimo" if self.mimo else "glm4_moe"].items()}
        self.w = {}
        for name, weight in weights.items():
            part, _, kind = name.split(".", 3)[3].rpartition(".")
            self.w[f"{short.get(part, part)}.{kind}"] = weight
        self.embedding, self.output = embedding, output

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * self.w[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """[heads, DIM], of which MiMo turns all and GLM the first half."""
        turned = DIM if self.mimo else DIM // 2
        angle = position * THETA ** (-torch.arange(0, turned, 2) / turned)
        a, b = x[:, :turned].chunk(2, -1)
        c, s = angle.cos(), angle.sin()
        return torch.cat((a * c - b * s, b * c + a * s, x[:, turned:]), -1)

    def __call__(self, text: list[int], states: torch.Tensor, path: list[int]) -> torch.Tensor:
        """Logits [vocab] behind ``text`` and the nodes of ``path``; ``states`` [len(text) - 1,
        HIDDEN]: the target's, of all but the newest token."""
        keys, values = [], []
        given = y = None
        for position, token in enumerate([*text[1:], *path]):
            if position < len(states):
                given = states[position]
            y = self.row(token, given, position, keys, values)
            given = self.norm(y, "norm") if self.mimo else y
        return self.output @ self.norm(y, "norm")

    def row(self, token, given, position, keys, values) -> torch.Tensor:
        embedded = self.embedding[token] * (position > 0)
        both = [self.norm(embedded, "enorm"), self.norm(given, "hnorm")]
        x = self.w["eh_proj.weight"] @ torch.cat(both[::-1] if self.mimo else both)
        n = self.norm(x, "input_layernorm")
        heads = {p: self.linear(n, f"self_attn.{p}_proj").view(-1, DIM) for p in "qkv"}
        if "self_attn.q_norm.weight" in self.w:
            heads |= {p: self.norm(heads[p], f"self_attn.{p}_norm") for p in "qk"}
        keys.append(self.rotate(heads["k"], position))
        values.append(heads["v"])
        query = self.rotate(heads["q"], position)
        seen = [
            torch.stack(rows).repeat_interleave(HEADS // KV_HEADS, 1) for rows in (keys, values)
        ]
        weights = torch.einsum("hd,shd->hs", query, seen[0]).div(DIM**0.5).softmax(-1)
        b = x + self.linear(torch.einsum("hs,shd->hd", weights, seen[1]).flatten(),
                            "self_attn.o_proj")  # fmt: skip
        n = self.norm(b, "post_attention_layernorm")
        return b + (self.experts(n) if "mlp.gate.weight" in self.w else self.mlp(n, "mlp"))

    def mlp(self, n: torch.Tensor, name: str) -> torch.Tensor:
        gate = torch.nn.functional.silu(self.linear(n, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(n, f"{name}.up_proj"), f"{name}.down_proj")

    def experts(self, n: torch.Tensor) -> torch.Tensor:
        scores = (self.w["mlp.gate.weight"] @ n).sigmoid()
        chosen = (scores + self.w["mlp.gate.e_score_correction_bias"]).topk(CHOSEN).indices
        shares = SCALING * scores[chosen] / scores[chosen].sum()
        parts = [
            share * self.mlp(n, f"mlp.experts.{i}")
            for i, share in zip(chosen.tolist(), shares, strict=True)
        ]
        return sum(parts) + self.mlp(n, "mlp.shared_experts")
