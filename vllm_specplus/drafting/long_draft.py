"""LongSpec's draft (arXiv 2502.17421): one layer whose memory does not grow with the text.

With self-attention ``A`` over a window, cross-attention ``C`` over the keys and values that the
*target's* last layer has of the verified text, MLP ``M``, the target's embedding ``e`` and output
layer ``U``, and norms ``n``::

    x = e(t)    a = x + A(n x)    c = a + C(n a)    y = c + M(n c)    logits  U n y

``C`` has projections of queries and outputs only; its queries are rotated by the positions of the
target, as its keys are. All rows of a request see the same there, tree or not, whatever positions
they have. The last norm is optional: the authors' drafts, which are read as they are, have none.

Keys and values of ``A`` follow from a token and its position alone, so that nothing has to be kept
of a text, and nothing can be wrong after a preemption: what is missing of a window is made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    rotate_half,
)

from vllm_specplus.drafting.eagle import Vocabulary
from vllm_specplus.drafting.long_checkpoint import (
    LAST_NORM,
    NORMS,
    PROJECTIONS,
    LongConfig,
    canonical,
    read_config,
)
from vllm_specplus.drafting.passes import Attend

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [T, head_dim]."""
Cross = Callable[[torch.Tensor, float], torch.Tensor]
"""Attention [T, heads, head_dim] of ``query`` [T, heads, head_dim] over the target's keys and
values, by ``scale``."""


class LongDraft:
    """Weights on one device. All calls run without gradients, unless ``parts`` ask for some."""

    num_layers = 1
    attention_layers = (0,)

    def __init__(self, folder: str, target: Vocabulary, device: torch.device, dtype: torch.dtype):
        self.config = config = read_config(folder)
        self.device, self.dtype, self._target = device, dtype, target
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.window = config.window
        """Positions before its own that a row sees."""
        layer = LlamaConfig(**config.layer, num_hidden_layers=1)
        self.max_positions = layer.max_position_embeddings
        named = {
            canonical(name): weight
            for file in sorted(Path(folder).glob("*.safetensors"))
            for name, weight in load_file(file).items()
        }
        named.pop(None, None)
        self.parts = _parts(config, layer.rms_norm_eps).to(dtype).to(device)
        """The modules, by the first part of their tensors' canonical names."""
        self.parts.load_state_dict(named)
        self.parts.eval().requires_grad_(False)
        self._rotary = LlamaRotaryEmbedding(layer).to(device)
        self._scale = self.head_dim**-0.5

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """cos and sin at ``positions`` int64 [T]."""
        cos, sin = self._rotary(self.parts[NORMS[0]].weight, position_ids=positions[None])
        return cos[0], sin[0]

    def keys_and_values(
        self, tokens: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows of ``tokens`` int64 [T] leave in the window: [T, kv_heads, head_dim] each."""
        _, normed = self._enter(tokens)
        keys, values = (self._heads("self_attn", f"{p}_proj", normed) for p in "kv")
        return rotated(keys, rotary), values

    def __call__(
        self, tokens: torch.Tensor, rotary: Rotary, attend: Attend, cross: Cross
    ) -> torch.Tensor:
        """y [T, hidden] of ``tokens`` int64 [T]; ``attend`` also keeps their keys and values."""
        parts = self.parts
        hidden, normed = self._enter(tokens)
        query, keys, values = (self._heads("self_attn", f"{p}_proj", normed) for p in "qkv")
        query, keys = rotated(query, rotary), rotated(keys, rotary)
        # A window counts the row itself.
        attended = attend(0, query, keys, values, self._scale, self.window + 1)
        hidden = hidden + parts["self_attn"]["o_proj"](attended.flatten(1))
        query = self._heads("cross_attn", "q_proj", parts[NORMS[1]](hidden))
        attended = cross(rotated(query, rotary), self._scale)
        hidden = hidden + parts["cross_attn"]["o_proj"](attended.flatten(1))
        normed, mlp = parts[NORMS[2]](hidden), parts["mlp"]
        return hidden + mlp["down_proj"](silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed))

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab]."""
        return self._target.output(self.parts[LAST_NORM](y) if LAST_NORM in self.parts else y)

    def _enter(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedded ``tokens``, and what the projections of the self-attention read of them."""
        embedded = self._target.embed(tokens).to(self.dtype)
        return embedded, self.parts[NORMS[0]](embedded)

    def _heads(self, part: str, projection: str, normed: torch.Tensor) -> torch.Tensor:
        """[T, heads, head_dim] of ``normed`` [T, hidden]."""
        return self.parts[part][projection](normed).unflatten(-1, (-1, self.head_dim))


def rotated(heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """``heads`` [T, H, head_dim] with their positions applied."""
    cos, sin = (each[:, None] for each in rotary)
    return (heads * cos + rotate_half(heads) * sin).to(heads.dtype)


def _parts(config: LongConfig, eps: float) -> nn.ModuleDict:
    """The draft's modules, without weights."""
    shapes = config.shapes

    def linear(name: str) -> nn.Linear:
        rows, columns = shapes[f"{name}.weight"]
        return nn.Linear(columns, rows, bias=f"{name}.bias" in shapes)

    parts: dict[str, nn.Module] = {
        part: nn.ModuleDict({name: linear(f"{part}.{name}") for name in names})
        for part, names in PROJECTIONS.items()
    }
    norms = [*NORMS, LAST_NORM] if f"{LAST_NORM}.weight" in shapes else NORMS
    return nn.ModuleDict(parts | {name: LlamaRMSNorm(config.hidden_size, eps) for name in norms})
