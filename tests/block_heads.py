"""Block heads, random or such that they are right, as their writers save them; and their formulas
in plain torch, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, DIM = 4, 2, 32
HIDDEN, MLP, EPS, THETA = 64, 96, 1e-6, 10000.0
MASK = 3
GROUP, CANDIDATES = 8, 7
"""Of DFlash-2: units that share a kernel, and tokens that are chosen from."""


def save_block(
    path: Path, kind: str, vocab: int, *, block: int = 4, layers: int = 2, states: int = 2,
    writer: str = "speculators", own_tokens: int | None = None, rank: int = 8, bias: bool = False,
    hidden: int = HIDDEN, target: int = HIDDEN, own: tuple[str, ...] = (), spread: float = 0.2,
    seed: int = 3, **config,
) -> str:  # fmt: skip
    """A random head of DFlash, DFlash-2 or DSpark in float32; ``own``: which of embed_tokens,
    lm_head, mask_embedding and confidence_head it has; ``config``: more keys, or others."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    tensors = {
        "fc.weight": weight(hidden, states * target),
        "hidden_norm.weight": 1 + weight(hidden),
        "norm.weight": 1 + weight(hidden),
    }
    for i in range(layers):
        of = f"layers.{i}"
        for part, rows in (("q", HEADS * DIM), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM)):
            tensors[f"{of}.self_attn.{part}_proj.weight"] = weight(rows, hidden)
            if bias:
                tensors[f"{of}.self_attn.{part}_proj.bias"] = weight(rows)
        tensors[f"{of}.self_attn.o_proj.weight"] = weight(hidden, HEADS * DIM)
        if bias:
            tensors[f"{of}.self_attn.o_proj.bias"] = weight(hidden)
        tensors |= {f"{of}.self_attn.{part}_norm.weight": 1 + weight(DIM) for part in "qk"}
        tensors |= {f"{of}.mlp.{part}_proj.weight": weight(MLP, hidden) for part in ("gate", "up")}
        tensors[f"{of}.mlp.down_proj.weight"] = weight(hidden, MLP)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{of}.{norm}.weight"] = 1 + weight(hidden)
    few = own_tokens or vocab
    if own_tokens is not None:
        ids = torch.randperm(vocab, generator=generator)[:own_tokens].sort().values
        tensors["d2t"] = ids - torch.arange(own_tokens)
        tensors["t2d"] = torch.isin(torch.arange(vocab), ids)
    if own_tokens is not None or "lm_head" in own:
        tensors["lm_head.weight"] = weight(few, hidden)
    if "embed_tokens" in own:
        tensors["embed_tokens.weight"] = weight(vocab, hidden)
    if "mask_embedding" in own:
        tensors["mask_embedding"] = weight(hidden)
    if kind == "dspark" and rank:
        tensors["markov_head.markov_w1.weight"] = 3 * weight(vocab, rank)
        tensors["markov_head.markov_w2.weight"] = 3 * weight(few, rank)
    if kind == "dflash2":
        for of in (
            f"layers.{i}.{part}_conv" for i in range(layers) for part in ("attention", "mlp")
        ):
            tensors[f"{of}.base_kernel"] = torch.tensor([1.0, 0.5])[:, None] + weight(2, 2, hidden)
            tensors[f"{of}.kernel_projection.weight"] = weight(4 * hidden // GROUP, hidden)
        for part in ("predecessor", "successor"):
            tensors[f"candidate_selector.{part}_codebook"] = 3 * weight(vocab, rank)
        tensors["candidate_selector.hidden_projection.weight"] = weight(rank, hidden)
    if "confidence_head" in own:
        reads = hidden + rank * config.get("confidence_head_with_markov", True)
        tensors["confidence_head.proj.weight"] = weight(1, reads)
        tensors["confidence_head.proj.bias"] = weight(1)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    described = describe(kind, vocab, block, layers, states, writer, few, rank, bias, hidden)
    if target != hidden:
        described["target_hidden_size"] = target
    write_config(path, described, config)
    return str(path)


def describe(
    kind: str, vocab: int, block: int, layers: int, states: int, writer: str, few: int, rank: int,
    bias: bool, hidden: int,
) -> dict:  # fmt: skip
    """The config as this ``writer`` has it: ``speculators`` or ``authors``."""
    layer = {
        "model_type": "qwen3", "vocab_size": vocab, "hidden_size": hidden, "hidden_act": "silu",
        "intermediate_size": MLP, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": DIM, "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "max_position_embeddings": 1024, "attention_bias": bias,
    }  # fmt: skip
    ids = list(range(states))
    markov = {
        "markov_rank": rank, "markov_head_type": "vanilla", "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    } if kind == "dspark" else {}  # fmt: skip
    second = {
        "conv_kernel_size": 2, "conv_group_size": GROUP, "selector_rank": rank,
        "selector_top_k": CANDIDATES,
    } if kind == "dflash2" else {}  # fmt: skip
    if writer == "speculators":
        return {
            "speculators_model_type": kind, "speculators_version": "0.9.0", "block_size": block,
            "transformer_layer_config": layer, "draft_vocab_size": few, "mask_token_id": MASK,
            "aux_hidden_state_layer_ids": [i + 1 for i in ids],
            "sample_from_anchor": kind == "dspark", **markov, **second,
        }  # fmt: skip
    known = {"mask_token_id": MASK, "target_layer_ids": ids}
    if kind == "dflash":
        name, known = "DFlashDraftModel", {"dflash_config": known}
    elif kind == "dflash2":
        name, known = "DFlash2DraftModel", {"dflash_config": known | second}
    else:
        name = "Qwen3DSparkModel"
    return {"architectures": [name], "block_size": block} | layer | known | markov


def write_config(path: Path, described: dict, changes: dict) -> None:
    """``changes`` that a nested config has are made there; None removes a key."""
    for key, value in changes.items():
        places = [described.get("transformer_layer_config"), described.get("dflash_config")]
        where = next((each for each in places if each and key in each), described)
        where[key] = value
        if value is None:
            del where[key]
    (path / "config.json").write_text(json.dumps(described))


def save_medusa(
    path: Path, vocab: int, *, heads: int = 3, layers: int = 1, own_heads: bool = True,
    bias: bool = True, old_names: bool = False, map_tokens: int | None = None, hidden: int = HIDDEN,
    spread: float = 0.2, **config,
) -> str:  # fmt: skip
    """Random Medusa heads in float32, with vLLM's names or those of their authors."""
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    tensors = {}
    for i in range(heads):
        for j in range(layers):
            name = f"{i}.{j}.linear" if old_names else f"blocks.{i}.layers.{j}"
            tensors[f"{name}.weight"] = weight(hidden, hidden)
            if bias:
                tensors[f"{name}.bias"] = weight(hidden)
        if own_heads:
            name = f"{i}.{layers}" if old_names else f"lm_heads.{i}"
            tensors[f"{name}.weight"] = weight(map_tokens or vocab, hidden)
    if map_tokens:
        ids = torch.randperm(vocab, generator=generator)[:map_tokens]
        tensors["token_map"] = ids
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    described = {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": hidden,
        "num_heads": heads, "num_hidden_layers": layers, "vocab_size": vocab,
    }  # fmt: skip
    if old_names:
        described = {"medusa_num_heads": heads, "medusa_num_layers": layers}
    write_config(path, described, config)
    return str(path)


class Reference:
    """A head's formulas (``drafting/block_heads.py``), one row after the other, with no cache."""

    def __init__(self, folder: str, embedding: torch.Tensor, output: torch.Tensor):
        """``embedding``, ``output`` [vocab, hidden]: the target's."""
        raw = json.loads((Path(folder) / "config.json").read_text())
        self.spec = "speculators_model_type" in raw
        nested = raw.get("transformer_layer_config", {}) | raw.get("dflash_config", {})
        self.config = raw | nested
        self.w = load_file(Path(folder) / "model.safetensors")
        self.embedding = self.w.get("embed_tokens.weight", embedding)
        self.output = self.w.get("lm_head.weight", output)
        self.ids = torch.arange(len(self.output))
        if "d2t" in self.w:
            self.ids = self.ids + self.w["d2t"]
        default = not self.spec and "Qwen3DSparkModel" in raw["architectures"]
        self.from_anchor = self.config.get("sample_from_anchor", default)
        self.second = "candidate_selector.predecessor_codebook" in self.w

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

    def key_and_value(self, x: torch.Tensor, layer: int, position: int) -> tuple:
        key, value = (
            self.linear(x, f"layers.{layer}.self_attn.{part}_proj").view(-1, DIM) for part in "kv"
        )
        return self.rotate(self.norm(key, f"layers.{layer}.self_attn.k_norm"), position), value

    def sees(self, layer: int, n: int, row: int, position: int, in_block: bool) -> bool:
        """Does the query at ``row`` see the key at ``position``? ``n``: index of the anchor."""
        kinds = self.config.get("layer_types") or ["full_attention"] * 9
        windowed = kinds[layer] == "sliding_attention"
        if self.spec:
            windowed = windowed and self.config.get("use_sliding_window", False)
            causal = windowed and not self.config.get("sliding_window_non_causal", False)
            far = windowed and not in_block and position < n - self.config["sliding_window"]
        else:
            causal = self.config.get("causal", windowed)
            far = windowed and position <= row - self.config["sliding_window"]
        return not far and not (causal and position > row)

    def __call__(self, text: list[int], states: torch.Tensor) -> torch.Tensor:
        """U [D, own tokens] behind ``text``; ``states`` [len(text) - 1, m * hidden]."""
        n = len(text) - 1
        context = [self.norm(self.linear(each, "fc"), "hidden_norm") for each in states]
        mask = self.w.get("mask_embedding", self.embedding[MASK])
        rows = [self.embedding[text[-1]], *[mask] * (self.config["block_size"] - 1)]
        rows = [each * self.config.get("input_embedding_scale", 1) for each in rows]
        for layer in range(self.config["num_hidden_layers"]):
            rows = self.layer(layer, n, context, rows)
        rows = rows if self.from_anchor else rows[1:]
        self.rows = [self.norm(each, "norm") for each in rows]
        """Of the last block, behind the last norm."""
        logits = torch.stack([self.output @ each for each in self.rows])
        cap = self.config.get("final_logit_softcapping")
        logits = logits if not cap else cap * (logits / cap).tanh()
        return logits * self.config.get("output_multiplier", 1)

    def layer(self, layer: int, n: int, context: list, rows: list) -> list:
        of, attention = f"layers.{layer}", f"layers.{layer}.self_attn"
        seen = [(t, False, *self.key_and_value(c, layer, t)) for t, c in enumerate(context)]
        normed = [self.norm(each, f"{of}.input_layernorm") for each in rows]
        normed, after = self.convolved(f"{of}.attention_conv", normed)
        seen += [(n + j, True, *self.key_and_value(x, layer, n + j)) for j, x in enumerate(normed)]
        out = []
        for j, x in enumerate(normed):
            query = self.linear(x, f"{attention}.q_proj").view(-1, DIM)
            query = self.rotate(self.norm(query, f"{attention}.q_norm"), n + j)
            pairs = [kv for p, own, *kv in seen if self.sees(layer, n, n + j, p, own)]
            keys, values = (
                torch.stack(each).repeat_interleave(HEADS // KV_HEADS, 1)
                for each in zip(*pairs, strict=True)
            )
            weights = torch.einsum("hd,shd->hs", query, keys).div(DIM**0.5).softmax(-1)
            attended = torch.einsum("hs,shd->hd", weights, values).flatten()
            out.append(self.linear(attended, f"{attention}.o_proj"))
        rows = [row + x for row, x in zip(rows, after(out), strict=True)]
        normed = [self.norm(each, f"{of}.post_attention_layernorm") for each in rows]
        normed, after = self.convolved(f"{of}.mlp_conv", normed)
        out = []
        for m in normed:
            gate = torch.nn.functional.silu(self.linear(m, f"{of}.mlp.gate_proj"))
            inner = gate * self.linear(m, f"{of}.mlp.up_proj")
            out.append(self.linear(inner, f"{of}.mlp.down_proj"))
        return [row + x for row, x in zip(rows, after(out), strict=True)]

    def convolved(self, name: str, rows: list) -> tuple:
        """The rows behind the first convolution, and the second one."""
        if f"{name}.base_kernel" not in self.w:
            return rows, lambda given: given
        base = self.w[f"{name}.base_kernel"]
        deltas = [self.linear(x, f"{name}.kernel_projection").view(2, 2, -1) for x in rows]

        def convolve(given: list, side: int) -> list:
            out = []
            for i, delta in enumerate(deltas):
                kernel = base[side] + delta[side].repeat_interleave(GROUP, -1)
                taps = [kernel[tap] * given[i - tap] for tap in range(2) if i >= tap]
                out.append(sum(taps))
            return out

        return convolve(rows, 0), lambda given: convolve(given, 1)

    def law(self, logits: torch.Tensor, previous: int, depth: int = 0) -> torch.Tensor:
        """Log-probabilities [own tokens] behind the token ``previous``, of U [own tokens]; those of
        DFlash-2 are of the row of that depth."""
        if self.second:
            projected = self.linear(self.rows[depth], "candidate_selector.hidden_projection")
            before = self.w["candidate_selector.predecessor_codebook"][previous]
            edges = self.w["candidate_selector.successor_codebook"] @ (before * projected)
            logits = logits + edges
        if "markov_head.markov_w1.weight" in self.w:
            first = self.w["markov_head.markov_w1.weight"][previous]
            logits = logits + self.w["markov_head.markov_w2.weight"] @ first
        return logits.log_softmax(-1)

    def trust(self, depth: int, previous: int) -> torch.Tensor | float:
        """Logarithm of how far the law behind ``previous`` can be trusted."""
        if (
            not self.config.get("enable_confidence_head")
            or "confidence_head.proj.weight" not in self.w
        ):
            return 0.0
        read = self.rows[depth]
        if self.config["confidence_head_with_markov"]:
            read = torch.cat((read, self.w["markov_head.markov_w1.weight"][previous]))
        return torch.nn.functional.logsigmoid(self.linear(read, "confidence_head.proj"))


def medusa_reference(folder: str, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Logits [heads, tokens] of the heads in vLLM's names, for the state ``hidden``."""
    w = load_file(Path(folder) / "model.safetensors")
    rows = []
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        x, j = hidden, 0
        while f"blocks.{i}.layers.{j}.weight" in w:
            y = w[f"blocks.{i}.layers.{j}.weight"] @ x + w.get(f"blocks.{i}.layers.{j}.bias", 0)
            x, j = x + y * torch.sigmoid(y), j + 1
        rows.append(w.get(f"lm_heads.{i}.weight", output) @ x)
    return torch.stack(rows)
