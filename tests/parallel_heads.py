"""Random P-EAGLE heads, as ``speculators`` and their authors save them; their formulas in plain
torch, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, DIM = 4, 2, 16
HIDDEN, MLP, EPS, THETA = 64, 96, 1e-5, 10000.0
MASK = 3


def save_parallel(
    path: Path, vocab: int, *, family: str = "llama", depth: int = 4, layers: int = 2,
    writer: str = "speculators", own_tokens: int | None = None, bias: bool = False,
    hidden: int = HIDDEN, head_dim: int = DIM, own: tuple[str, ...] = (), spread: float = 0.2,
    states: int = 3, **config,
) -> str:  # fmt: skip
    """A head in float32; ``own``: which of embed_tokens, lm_head, input_norm and fc_norm it has;
    ``config``: more keys, or others, None removes one."""
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    tensors = {
        "fc.weight": weight(hidden, states * hidden), "norm.weight": 1 + weight(hidden),
        "mask_hidden": 5 * weight(1, 1, states * hidden),
    }  # fmt: skip
    for i in range(layers):
        of, reads = f"layers.{i}", hidden if i else 2 * hidden
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{of}.self_attn.{part}_proj.weight"] = weight(heads * head_dim, reads)
            if bias:
                tensors[f"{of}.self_attn.{part}_proj.bias"] = weight(heads * head_dim)
        tensors[f"{of}.self_attn.o_proj.weight"] = weight(hidden, HEADS * head_dim)
        if bias:
            tensors[f"{of}.self_attn.o_proj.bias"] = weight(hidden)
        if family == "qwen3":
            tensors |= {f"{of}.self_attn.{p}_norm.weight": 1 + weight(head_dim) for p in "qk"}
        tensors |= {f"{of}.mlp.{part}_proj.weight": weight(MLP, hidden) for part in ("gate", "up")}
        tensors[f"{of}.mlp.down_proj.weight"] = weight(hidden, MLP)
        norms = ["input_layernorm", "post_attention_layernorm", *["hidden_norm"] * (i == 0)]
        tensors |= {f"{of}.{norm}.weight": 1 + weight(hidden) for norm in norms}
    few = own_tokens or vocab
    if own_tokens is not None:
        ids = torch.randperm(vocab, generator=generator)[:own_tokens].sort().values
        tensors["d2t"] = ids - torch.arange(own_tokens)
        tensors["t2d"] = torch.isin(torch.arange(vocab), ids)
    if own_tokens is not None or "lm_head" in own:
        tensors["lm_head.weight"] = weight(few, hidden)
    if "embed_tokens" in own:
        tensors["embed_tokens.weight"] = weight(vocab, hidden)
    if "input_norm" in own:
        tensors["input_norm.weight"] = 1 + weight(states * hidden)
    if "fc_norm" in own:
        tensors |= {f"fc_norm.{i}.weight": 1 + weight(hidden) for i in range(states)}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    described = describe(family, vocab, few, depth, layers, writer, bias, hidden, head_dim) | config
    described = {key: value for key, value in described.items() if value is not None}
    (path / "config.json").write_text(json.dumps(described))
    return str(path)


def describe(
    family: str, vocab: int, few: int, depth: int, layers: int, writer: str, bias: bool,
    hidden: int, head_dim: int,
) -> dict:  # fmt: skip
    """The config as this ``writer`` has it: ``speculators`` or ``authors``."""
    layer = {
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "hidden_act": "silu",
        "intermediate_size": MLP, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": head_dim, "rms_norm_eps": EPS,
        "rope_theta": THETA, "max_position_embeddings": 1024, "attention_bias": bias,
    }  # fmt: skip
    if writer == "authors":
        name = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}[family]
        known = {"architectures": [name], "ptd_token_id": MASK, "num_depths": depth}
        return layer | known | {"draft_vocab_size": few}
    return {
        "speculators_model_type": "peagle", "speculators_version": "0.9.0",
        "architectures": ["PEagleDraftModel"], "transformer_layer_config": layer,
        "draft_vocab_size": few, "mask_token_id": MASK, "norm_before_residual": False,
        "speculators_config": {
            "algorithm": "peagle", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": depth}],
            "verifier": {"name_or_path": "any", "architectures": []},
        },
    }  # fmt: skip


class ParallelReference:
    """A head's formulas (``drafting/peagle.py``), one row after the other, with no cache."""

    def __init__(self, folder: str, embedding: torch.Tensor, output: torch.Tensor):
        """``embedding``, ``output`` [vocab, HIDDEN]: the target's."""
        raw = json.loads((Path(folder) / "config.json").read_text())
        self.config = raw | raw.get("transformer_layer_config", {})
        self.w = load_file(Path(folder) / "model.safetensors")
        self.embedding = self.w.get("embed_tokens.weight", embedding)
        self.output = self.w.get("lm_head.weight", output)
        self.ids = torch.arange(len(self.output))
        if "d2t" in self.w:
            self.ids = self.ids + self.w["d2t"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * self.w[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """[heads, DIM]"""
        angle = position * THETA ** (-torch.arange(0, DIM, 2) / DIM)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        if "input_norm.weight" in self.w:
            states = self.norm(states, "input_norm")
        if "fc_norm.0.weight" in self.w:
            each = states.chunk(3)
            states = torch.cat([self.norm(x, f"fc_norm.{i}") for i, x in enumerate(each)])
        return self.w["fc.weight"] @ states

    def __call__(self, text: list[int], states: torch.Tensor, depth: int) -> torch.Tensor:
        """U [depth, own tokens] behind ``text``; ``states`` [len(text) - 1, m * HIDDEN]."""
        tokens = [*text[1:], *[MASK] * (depth - 1)]
        masks = [self.w["mask_hidden"].flatten()] * (depth - 1)
        given = [self.fuse(each) for each in (*states, *masks)]
        layers = self.config["num_hidden_layers"]
        seen: list[tuple[list, list]] = [([], []) for _ in range(layers)]
        rows = []
        for position, (token, feature) in enumerate(zip(tokens, given, strict=True)):
            normed = self.norm(feature, "layers.0.hidden_norm")
            residual = normed if self.config.get("norm_before_residual") else feature
            embedded = self.norm(self.embedding[token], "layers.0.input_layernorm")
            x = self.layer(0, torch.cat((embedded, normed)), residual, position, seen[0])
            for i in range(1, layers):
                entering = self.norm(x, f"layers.{i}.input_layernorm")
                x = self.layer(i, entering, x, position, seen[i])
            rows.append(x)
        return torch.stack([self.output @ self.norm(x, "norm") for x in rows[-depth:]])

    def layer(self, i: int, entering, residual, position: int, seen) -> torch.Tensor:
        of, (keys, values) = f"layers.{i}", seen
        attention = f"{of}.self_attn"
        heads = {p: self.linear(entering, f"{attention}.{p}_proj").view(-1, DIM) for p in "qkv"}
        if f"{attention}.q_norm.weight" in self.w:
            heads |= {p: self.norm(heads[p], f"{attention}.{p}_norm") for p in "qk"}
        keys.append(self.rotate(heads["k"], position))
        values.append(heads["v"])
        query = self.rotate(heads["q"], position)
        k, v = (torch.stack(each).repeat_interleave(HEADS // KV_HEADS, 1) for each in seen)
        weights = torch.einsum("hd,shd->hs", query, k).div(DIM**0.5).softmax(-1)
        attended = torch.einsum("hs,shd->hd", weights, v).flatten()
        b = residual + self.linear(attended, f"{attention}.o_proj")
        n = self.norm(b, f"{of}.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(n, f"{of}.mlp.gate_proj"))
        return b + self.linear(gate * self.linear(n, f"{of}.mlp.up_proj"), f"{of}.mlp.down_proj")
