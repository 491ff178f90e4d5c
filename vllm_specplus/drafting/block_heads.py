"""Heads that predict a block of tokens in one pass, from the target's hidden states.

``n`` is the index of the newest token ``a``, which the target has not read yet; ``s`` are its
hidden states at a position of the text.

DFlash (DeepSpec's DSpark has the same body)::

    c_t = norm(W [s_1; ..; s_m])     a position t < n of the text, a row of context
    k_t, v_t = rope_t(norm(Wk c_t)), Wv c_t                          of every layer
    x = e(a), e(mask), ...           queries at n, n + 1, ..., through Qwen3 layers that
                                     see the context and each other (or those before)
    logits_j = U norm(x_j)           the mask at n + j predicts the token there, and
                                     DSpark's row at n + j the one behind it

DSpark adds ``W2 W1[previous token]`` to the logits, and says with ``c = sigmoid(w [x; W1[previous
token]] + b)`` how far the law is to be trusted: a token counts for c times what the law gives it.
DFlash-2 has convolutions in its layers, and a selector behind them (``dflash2.py``). Medusa has no
layers: its head i predicts, from the target's last hidden state ``h`` of position ``n - 1``, the
token at ``n + 1 + i``::

    x = h; x = x + silu(W x + b) ...     logits  U_i x

Context rows come from what the target computed and from nothing else, so they are final once they
are written. Read from the checkpoints of ``speculators`` and of the heads' authors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from vllm_specplus.drafting import block_trees
from vllm_specplus.drafting.block_checkpoint import canonical, read_config
from vllm_specplus.drafting.block_config import BlockConfig, Body, Second
from vllm_specplus.drafting.block_trees import Laws
from vllm_specplus.drafting.dflash2 import CandidateSelector, GroupedConv, around, shaped
from vllm_specplus.drafting.eagle import Vocabulary
from vllm_specplus.drafting.gathered import GatheredPages
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.peagle import ParallelHead
from vllm_specplus.strict import quoted


def load_head(
    folder: str, target: Vocabulary, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> BlockHead | MedusaHead | ParallelHead:
    """The head of a folder, of whichever kind; DraftModelError if its ids are not the target's."""
    config = read_config(folder)
    kind = _CLASSES[config.kind]
    weights = {
        canonical(name): weight
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, weight in load_file(file).items()
    }
    own = weights.pop("token_map", None)
    if (offsets := weights.pop("d2t", None)) is not None:
        own = torch.arange(len(offsets)) + offsets.long()
    weights.pop("t2d", None)  # follows from d2t
    if own is not None and not 0 <= int(own.min()) <= int(own.max()) < vocab_size:
        raise DraftModelError(
            f"block head {quoted(folder)} predicts tokens beyond the {vocab_size} of its target: "
            f"use a head of this target"
        )
    head = kind(config, weights, own, target, device, dtype)
    head.predicts = vocab_size if own is None else len(own)
    return head


class BlockHead:
    """A head of DFlash, DFlash-2 or DSpark on one device. All calls run without gradients."""

    predicts: int
    """Tokens of which it gives logits."""

    def __init__(
        self, config: BlockConfig, weights: dict[str, torch.Tensor], own: torch.Tensor | None,
        target: Vocabulary, device: torch.device, dtype: torch.dtype,
    ):  # fmt: skip
        """``weights`` by canonical names; ``own`` int64 [V']: the ids of the tokens that it
        predicts, None: all of them."""
        assert isinstance(config.body, Body)
        self.config, self.body = config, config.body
        self.device, self.dtype = device, dtype
        self._target = target
        self._own = None if own is None else own.to(device)
        layer = Qwen3Config(**self.body.layer, attn_implementation="sdpa")
        self.attention_layers = list(range(layer.num_hidden_layers))
        self.kv_heads, self.head_dim = layer.num_key_value_heads, layer.head_dim
        trust = [weights.pop(f"confidence_head.proj.{each}", None) for each in ("weight", "bias")]
        self._trust = [None if each is None else each.to(device).float() for each in trust]
        mask = weights.pop("mask_embedding", None)
        self._mask = None if mask is None else mask.to(device, dtype)
        with torch.device(device):
            self.parts = _parts(layer, weights, self.body.second).to(dtype)
            self._rotary = Qwen3RotaryEmbedding(layer)
        self.parts.load_state_dict(weights)
        self.parts.eval().requires_grad_(False)

    # -- text ---------------------------------------------------------------------------

    def context(
        self, states: torch.Tensor, positions: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [n, kv_heads, head_dim] of rows of context, layer by layer.

        ``states`` [n, states * target_hidden]; ``positions`` int64 [n].
        """
        rows = self.parts["hidden_norm"](self.parts["fc"](states))
        cos, sin = (each[0, :, None] for each in self.rotary(positions[None]))
        for layer in self.parts["layers"]:
            attention = layer["self_attn"]
            keys, values = (
                project(rows).unflatten(-1, (self.kv_heads, self.head_dim))
                for project in (attention.k_proj, attention.v_proj)
            )
            keys = attention.k_norm(keys)
            yield keys * cos + rotate_half(keys) * sin, values

    # -- block --------------------------------------------------------------------------

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [R, n, head_dim] at ``positions`` int64 [R, n]."""
        # Only the dtype and device of the first argument matter.
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self._rotary(like, position_ids=positions)

    def masks(
        self, places: torch.Tensor, anchors: torch.Tensor, slots: torch.Tensor
    ) -> list[torch.Tensor]:
        """Of each layer, bool [R, 1, q, S]: which slots its queries may see.

        ``places`` int64 [R, S] position that each slot holds, -1: none; ``anchors`` int64 [R]
        positions of the newest tokens; ``slots`` bool [R, S]: is it one of the block?
        """
        own = torch.arange(self.body.queries, device=places.device)
        rows = (anchors[:, None] + own)[..., None]  # [R, q, 1]
        places, slots = places[:, None], slots[:, None]
        every = (places >= 0) & (slots | (places < anchors[:, None, None]))
        made: dict[tuple[int | None, bool], torch.Tensor] = {}
        kinds = list(zip(self.body.windows, self.body.causal, strict=True))
        for window, causal in kinds:
            if (window, causal) in made:
                continue
            mask = every.expand(-1, self.body.queries, -1)
            if causal:
                mask = mask & (places <= rows)
            if window is not None and self.body.window_of_anchor:
                mask = mask & (slots | (places >= anchors[:, None, None] - window))
            elif window is not None:
                mask = mask & (places > rows - window)
            made[window, causal] = mask[:, None]
        return [made[kind] for kind in kinds]

    def __call__(
        self, tokens: torch.Tensor, rotary: tuple, masks: list[torch.Tensor], cache: GatheredPages
    ) -> torch.Tensor:
        """Behind the last norm, [R, D, hidden] of the rows that predict.

        ``tokens`` int64 [R] the newest ones; ``rotary`` of all queries; ``masks`` as of
        :meth:`masks`. Writes the queries' keys and values to ``cache``.
        """
        hidden = self._embed(tokens)
        for layer, mask in zip(self.parts["layers"], masks, strict=True):
            attend = functools.partial(
                _attended, layer["self_attn"], position_embeddings=rotary, attention_mask=mask,
                past_key_values=cache,
            )  # fmt: skip
            normed = layer["input_layernorm"](hidden)
            hidden = hidden + around(layer, "attention_conv", attend, normed)
            normed = layer["post_attention_layernorm"](hidden)
            hidden = hidden + around(layer, "mlp_conv", layer["mlp"], normed)
        return self.parts["norm"](hidden[:, -self.config.depth :])

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The queries [R, q, hidden]: the newest ``tokens`` int64 [R], and masks."""
        block = tokens.new_full((len(tokens), self.body.queries), self.body.mask_token)
        block[:, 0] = tokens
        own = "embed_tokens" in self.parts
        hidden = self.parts["embed_tokens"](block) if own else self._target.embed(block)
        hidden = hidden.to(self.dtype)
        if self._mask is not None:  # wherever the token is, as in vLLM
            hidden = torch.where((block == self.body.mask_token)[..., None], self._mask, hidden)
        return hidden if self.body.second is None else hidden * self.body.second.embedding_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """U of [..., hidden], float32 [..., own tokens]."""
        own = "lm_head" in self.parts
        logits = self.parts["lm_head"](hidden).float() if own else self._target.output(hidden)
        return logits if self.body.second is None else shaped(logits, self.body.second)

    def laws(self, hidden: torch.Tensor, tokens: torch.Tensor, width: int) -> Laws:
        """Of blocks with ``hidden`` [R, D, hidden] behind the newest ``tokens`` int64 [R]."""
        logits = self.logits(hidden)
        if self.body.second is not None:
            selector = self.parts["candidate_selector"]
            return selector.laws(logits, self.body.second.candidates, hidden, tokens)
        trust = functools.partial(self._trusted, hidden) if self.body.confidence else None
        if "markov_head" not in self.parts:
            known = None if trust is None else trust()
            return block_trees.factorised(logits, width, self._own, known)
        rows, columns = (self.parts["markov_head"][f"markov_w{i}"].weight for i in (1, 2))
        return block_trees.markov(logits, width, tokens, rows, columns, self._own, trust)

    def _trusted(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Logarithms, float32 [R, D, K or 1], of how far the laws of rows ``hidden`` [R, D, hidden]
        can be trusted, behind tokens whose W1 is ``before`` [R, D, K, r]."""
        (weight,), bias = self._trust
        size = hidden.shape[-1]
        score = (hidden.float() @ weight[:size])[..., None]
        if self.body.confidence == "token" and before is not None:
            score = score + before.float() @ weight[size:]
        return nn.functional.logsigmoid(score if bias is None else score + bias)


class MedusaHead:
    """Medusa's heads on one device. All calls run without gradients."""

    predicts: int
    """As of :class:`BlockHead`."""

    def __init__(
        self, config: BlockConfig, weights: dict[str, torch.Tensor], own: torch.Tensor | None,
        target: Vocabulary, device: torch.device, dtype: torch.dtype,
    ):  # fmt: skip
        """As :class:`BlockHead`."""
        self.config, self.device, self.dtype = config, device, dtype
        self._target = target
        self._own = None if own is None else own.to(device)
        weights = {name: each.to(device, dtype) for name, each in weights.items()}
        numbers = range(config.depth)
        self._blocks = []
        for i in numbers:
            names = [name for name in weights if name.startswith(f"blocks.{i}.layers.")]
            layers = 1 + max(int(name.split(".")[3]) for name in names)
            self._blocks.append(
                [
                    (weights[f"{each}.weight"], weights.get(f"{each}.bias"))
                    for each in (f"blocks.{i}.layers.{j}" for j in range(layers))
                ]
            )
        outputs = [weights.get(f"lm_heads.{i}.weight", weights.get("lm_heads.0.weight"))
                   for i in numbers]  # fmt: skip
        if own is not None and outputs[0] is not None and len(outputs[0]) > len(own):
            outputs = [None if each is None else each[self._own] for each in outputs]
        self._outputs = outputs

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[R, hidden] of the target's last rows -> [R, D, hidden] of each head."""
        rows = []
        for block in self._blocks:
            hidden = states
            for weight, bias in block:
                hidden = hidden + nn.functional.silu(nn.functional.linear(hidden, weight, bias))
            rows.append(hidden)
        return torch.stack(rows, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, D, hidden] -> float32 [R, D, own tokens]."""
        if self._outputs[0] is None:
            return self._target.output(hidden)
        each = [
            nn.functional.linear(hidden[:, i], output)
            for i, output in enumerate(self._outputs)
            if output is not None
        ]
        return torch.stack(each, 1).float()

    def laws(self, hidden: torch.Tensor, tokens: torch.Tensor, width: int) -> Laws:
        """Of blocks with ``hidden`` [R, D, hidden]; what the newest ``tokens`` are is in them."""
        return block_trees.factorised(self.logits(hidden), width, self._own)


_CLASSES = {
    **dict.fromkeys(("dflash", "dflash2", "dspark"), BlockHead),
    "medusa": MedusaHead,
    "peagle": ParallelHead,
}


def _attended(attention: nn.Module, normed: torch.Tensor, **given: Any) -> torch.Tensor:
    return attention(hidden_states=normed, **given)[0]


def _parts(
    config: Qwen3Config, weights: dict[str, torch.Tensor], second: Second | None
) -> nn.ModuleDict:
    """The head's modules, transformers' own, without weights."""
    hidden, eps = config.hidden_size, config.rms_norm_eps

    def linear(name: str) -> nn.Linear:
        rows, columns = weights[f"{name}.weight"].shape
        return nn.Linear(columns, rows, bias=False)

    def embedding(name: str) -> nn.Embedding:
        return nn.Embedding(*weights[f"{name}.weight"].shape)

    parts: dict[str, Any] = {
        "fc": linear("fc"),
        "hidden_norm": Qwen3RMSNorm(hidden, eps),
        "norm": Qwen3RMSNorm(hidden, eps),
        "layers": nn.ModuleList(
            nn.ModuleDict(
                {
                    "input_layernorm": Qwen3RMSNorm(hidden, eps),
                    "self_attn": Qwen3Attention(config, layer_idx=i),
                    "post_attention_layernorm": Qwen3RMSNorm(hidden, eps),
                    "mlp": Qwen3MLP(config),
                }
            )
            for i in range(config.num_hidden_layers)
        ),
    }
    if "embed_tokens.weight" in weights:
        parts["embed_tokens"] = embedding("embed_tokens")
    if "lm_head.weight" in weights:
        parts["lm_head"] = linear("lm_head")
    if "markov_head.markov_w1.weight" in weights:
        parts["markov_head"] = nn.ModuleDict(
            {
                "markov_w1": embedding("markov_head.markov_w1"),
                "markov_w2": linear("markov_head.markov_w2"),
            }
        )
    if second is not None:
        for layer in parts["layers"]:
            for name in ("attention_conv", "mlp_conv"):
                layer[name] = GroupedConv(hidden, second)
        parts["candidate_selector"] = CandidateSelector(
            hidden, *weights["candidate_selector.predecessor_codebook"].shape
        )
    return nn.ModuleDict(parts)
