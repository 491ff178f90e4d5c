"""MTP modules: one layer that a target was trained with, to predict the token after next.

Rows are those of an EAGLE head (``eagle.py``): that of position ``i`` takes what the target
computed there, ``h_i``, and the token that came next, ``t_{i+1}``; it predicts ``t_{i+2}``. Behind
the text a row takes, for ``h``, what the module gave in the row of its parent. With the target's
embedding ``e`` and output layer ``U``, norms ``n`` and a decoder layer ``L`` of its own::

    x = W [n e(t); n' h]      y = L x        logits  U n'' y         DeepSeek's, here GLM-4-MoE
    x = W [n' h; n e(t)]      y = n'' L x    logits  U y             MiMo

    h: as vLLM's model of the target hands it out; of nodes h = y

``e`` is 0 in the row of position 0, where no module was trained to read a token. A mixture of
experts is computed as transformers does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import Glm4MoeConfig, Qwen2Config
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeDecoderLayer,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from vllm_specplus.drafting.eagle import Vocabulary
from vllm_specplus.drafting.head_tensors import Canonical
from vllm_specplus.drafting.mtp_checkpoint import SHARED, canonical, read_config
from vllm_specplus.drafting.passes import Attend
from vllm_specplus.drafting.transformers_layer import PASSED_IN

#: Family -> config, decoder layer, norm and rotary embedding, transformers' own.
_MODULES = {
    "mimo": (Qwen2Config, Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeDecoderLayer, Glm4MoeRMSNorm, Glm4MoeRotaryEmbedding),
}


class MtpHead:
    """Weights on one device. All calls run without gradients; their meaning is that of
    :class:`~vllm_specplus.drafting.eagle.EagleHead`."""

    attention_layers = (0,)

    def __init__(self, folder: str, target: Vocabulary, device: torch.device, dtype: torch.dtype):
        self.config = config = read_config(folder)
        self.device, self.dtype, self._target = device, dtype, target
        config_class, layer_class, norm_class, rotary_class = _MODULES[config.family]
        layer = config_class(
            **config.layer, num_hidden_layers=1, attn_implementation=PASSED_IN,
            experts_implementation="eager",
        )  # fmt: skip
        self.kv_heads, self.head_dim = layer.num_key_value_heads, layer.head_dim
        self.max_positions = layer.max_position_embeddings
        hidden, eps = config.hidden_size, layer.rms_norm_eps
        parts: dict[str, nn.Module] = {
            "eh_proj": nn.Linear(2 * hidden, hidden, bias=False), "layer": layer_class(layer, 0)
        }  # fmt: skip
        parts |= {name: norm_class(hidden, eps) for name in ("enorm", "hnorm", "norm")}
        weights = _stacked(_load(folder, canonical(config.target_layers)), config.experts)
        self.parts = nn.ModuleDict(parts).to(dtype).to(device)
        self.parts.load_state_dict(weights)
        if config.experts:  # which experts are chosen must not depend on the dtype
            chooser: Any = self.parts["layer"].mlp
            bias = weights["layer.mlp.gate.e_score_correction_bias"]
            chooser.gate.e_score_correction_bias = bias.to(device, torch.float32)
        self.parts.eval().requires_grad_(False)
        self._rotary = rotary_class(layer).to(device)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """h of the target's hidden states: they are it."""
        return states

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, rotated units] at ``positions`` int64 [T]."""
        cos, sin = self._rotary(self.parts["eh_proj"].weight, position_ids=positions[None])
        return cos[0], sin[0]

    def __call__(
        self, tokens: torch.Tensor, features: torch.Tensor, rotary: tuple, attend: Attend
    ) -> torch.Tensor:
        """L x [T, hidden] of ``tokens`` int64 [T] and ``features`` [T, hidden], the h of each row;
        ``attend`` also keeps the rows' keys and values."""
        parts, (cos, sin) = self.parts, rotary
        # Of all rows that of position 0 is the one which is not turned in any of its units.
        first = (sin == 0).all(-1, keepdim=True)
        embedded = self._target.embed(tokens).to(self.dtype).masked_fill(first, 0)
        both = [parts["enorm"](embedded), parts["hnorm"](features)]
        if self.config.hidden_first:
            both.reverse()
        entering = parts["eh_proj"](torch.cat(both, -1))
        return parts["layer"](
            entering[None],
            attention_mask=None,
            position_embeddings=(cos[None], sin[None]),
            attend=attend,
            window_of_layer=None,
        )[0]

    def feature(self, y: torch.Tensor) -> torch.Tensor:
        """What the rows below take for h."""
        return self.parts["norm"](y) if self.config.norm_output else y

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]."""
        return self._target.output(self.parts["norm"](y))


def _load(folder: str, name_of: Canonical) -> dict[str, torch.Tensor]:
    """The module's tensors by their canonical names; those of the target are not read."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118  (not a mapping)
                name = name_of(tensor)
                if name is not None and name not in SHARED:
                    found[name] = tensors.get_tensor(tensor)
    return found


def _stacked(weights: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """The same with all experts in one tensor, as transformers holds them: gates [experts,
    2 * units, hidden] and what leads back [experts, hidden, units]."""
    if not experts:
        return weights
    of, both = "layer.mlp.experts", ("gate_proj", "up_proj")
    stacked = {name: each for name, each in weights.items() if not name.startswith(f"{of}.")}
    stacked[f"{of}.gate_up_proj"] = torch.stack(
        [torch.cat([weights[f"{of}.{i}.{part}.weight"] for part in both]) for i in range(experts)]
    )
    stacked[f"{of}.down_proj"] = torch.stack(
        [weights[f"{of}.{i}.down_proj.weight"] for i in range(experts)]
    )
    return stacked
