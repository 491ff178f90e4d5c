"""Chameleon and its kin in vLLM: texts with pictures in them, and guidance inside the model.

A Llama whose queries and keys are normalised head by head. Parameters carry the names of the
Hugging Face checkpoints.

With guidance every token is computed twice, with its prompt and without, by two sets of attention
layers, which keep their own keys and values in the *same* blocks and slots of the request. In the
second branch a picture sees nothing before its begin token. Every token outside of pictures is
read as the token that opens a text, and sees itself alone: so for Chameleon, whose bare text is the
opening token and a picture, the token before the picture is that opening token, whatever it is in
the text. Only distances matter to the rotary embedding, hence the positions of the two branches are
the same. What is kept for a token depends on the text up to it and on nothing else: prefix caching,
preemption, drafts and their compaction work as in any other model.

``guidance`` and ``picture_follows`` hold what our model runner knows of the batch's rows: the
scale, and which kind of token may follow (``image/chameleon.py``). The latter travels to the output
layer as a last column of the states.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ChameleonConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.sequence import IntermediateTensors

from vllm_specplus.engine.models.loading import load_blocks
from vllm_specplus.image.chameleon import CODE, TEXT, Layout


class HeadNorm(nn.Module):
    """Layer normalisation of each head, with a weight and bias of its own."""

    def __init__(self, heads: int, here: int, size: int):
        """``heads`` in all, of which this rank has ``here``."""
        super().__init__()
        self._heads, self._here = heads, here
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(here, size), requires_grad=False)
            parameter.weight_loader = self._load
            setattr(self, name, parameter)

    def _load(self, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        # Lumina-mGPT has one row for the heads of each rank that it was trained on.
        tensor = tensor.repeat_interleave(self._heads // len(tensor), 0)
        ranks = get_tensor_model_parallel_world_size()
        first = get_tensor_model_parallel_rank() * self._heads // ranks
        parameter.data.copy_(tensor[first : first + self._here])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [n, heads * size]."""
        x = x.unflatten(-1, self.weight.shape)
        return (F.layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight + self.bias).flatten(1)


class GuidedAttention(nn.Module):
    def __init__(self, config: ChameleonConfig, vllm_config: VllmConfig, layer: int, prefix: str):
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = config.hidden_size // heads
        here, kv_here = heads // ranks, max(kv_heads // ranks, 1)
        self.sizes = [here * head_dim, kv_here * head_dim, kv_here * head_dim]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, kv_heads, bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.hidden_size, config.hidden_size, bias=config.attention_bias,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self.q_norm = HeadNorm(heads, here, head_dim)
        self.k_norm = HeadNorm(kv_heads, kv_here, head_dim)
        self.rotary_emb = get_rope(
            head_dim, max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )  # fmt: skip

        def attention(number: int, backend=None) -> Attention:
            # vLLM tells caches apart by the one number in a layer's name.
            return Attention(
                here, head_dim, head_dim**-0.5, num_kv_heads=kv_here,
                cache_config=vllm_config.cache_config, prefix=f"layers.{number}.attn",
                attn_backend=backend,
            )  # fmt: skip

        self.branches = nn.ModuleList([attention(layer)])
        if config.guidance_scale is not None:
            backend = _backend_for_pictures(self.branches[0])
            self.branches.append(attention(config.num_hidden_layers + layer, backend))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        parts = zip(*(part.chunk(len(self.branches)) for part in (q, k, v)), strict=True)
        outs = [attention(*part) for attention, part in zip(self.branches, parts, strict=True)]
        return self.o_proj(outs[0] if len(outs) == 1 else torch.cat(outs))[0]


def _backend_for_pictures(attention: Attention) -> type:
    """What serves a branch without the prompt beside ``attention``."""
    backend = attention.get_attn_backend()
    if not hasattr(backend, "for_pictures"):
        raise ValueError(
            f"guidance does not work with the {backend.get_name()} attention backend: choose "
            f"FLASH_ATTN or TRITON_ATTN, or switch guidance off by "
            f"--hf-overrides '{{\"guidance_scale\": null}}'"
        )
    return backend.for_pictures()


class MLP(nn.Module):
    def __init__(self, config: ChameleonConfig, prefix: str):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=config.mlp_bias,
            prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
            prefix=f"{prefix}.down_proj",
        )  # fmt: skip
        self.silu_and_mul = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.silu_and_mul(self.gate_up_proj(x)[0]))[0]


class Block(nn.Module):
    def __init__(self, config: ChameleonConfig, vllm_config: VllmConfig, layer: int, prefix: str):
        super().__init__()
        self.swin_norm = config.swin_norm
        self.self_attn = GuidedAttention(config, vllm_config, layer, f"{prefix}.self_attn")
        self.mlp = MLP(config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.swin_norm:  # the 34B model's: behind the layers, whatever their names
            x = x + self.input_layernorm(self.self_attn(x, positions))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.mlp(self.post_attention_layernorm(x))


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "guidance": {0: "b"},
        "follows": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class ChameleonModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, opening: int, prefix: str = ""):
        """``opening``: the token that every text begins with."""
        super().__init__()
        config: ChameleonConfig = vllm_config.model_config.hf_config
        self.guided, self.opening = config.guidance_scale is not None, opening
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, vllm_config, i, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        guidance: torch.Tensor,
        follows: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalised states and ``follows``, [n, hidden + 1]."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if self.guided:
            opening = self.embed_input_ids(torch.full_like(positions[:1], self.opening))
            x = torch.cat((x, torch.where(follows[:, None] == TEXT, opening, x)))
            positions = torch.cat((positions, positions))
        for layer in self.layers:
            x = layer(x, positions)
        x = self.norm(x)
        if self.guided:
            x, bare = x.chunk(2)
            mixed = bare + guidance.to(x.dtype) * (x - bare)
            x = torch.where(follows[:, None] == CODE, mixed, x)
        return torch.cat((x, follows[:, None].to(x.dtype)), -1)


class ChameleonForConditionalGeneration(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: ChameleonConfig = vllm_config.model_config.hf_config
        self.config = config
        self.picture_layout = layout = Layout.of(config)
        self.model = ChameleonModel(
            vllm_config=vllm_config, opening=layout.opening, prefix=f"{prefix}.model"
        )
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        codes, size = int(layout.codes.max()) + 1, config.vq_config.embed_dim
        for name, buffer in (
            ("guidance", torch.full((rows, 1), config.guidance_scale or 1.0).float()),
            ("picture_follows", torch.full((rows,), TEXT)),
            ("forbidden", torch.from_numpy(layout.forbidden())),
            ("codebook", torch.zeros(codes, size).float()),
        ):
            self.register_buffer(name, buffer, persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = positions.shape[0]
        guidance, follows = self.guidance[:rows], self.picture_follows[:rows]
        return self.model(input_ids, positions, guidance, follows, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        follows = hidden_states[:, -1].long()
        logits = self.logits_processor(self.lm_head, hidden_states[:, :-1].contiguous())
        if logits is None:
            return None
        return logits.masked_fill(self.forbidden[follows], float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = load_blocks(self, self._of_text(weights), _place)
        if not self.codebook.any():
            raise ValueError(f"the checkpoint has no {_CODEBOOK}, the codes of its pictures")
        return loaded

    def _of_text(self, weights: Iterable[tuple[str, torch.Tensor]]):
        """The parameters that are here; keeps the codebook, which is the VQ model's. Pictures are
        decoded elsewhere, and rotary tables made anew."""
        for name, tensor in weights:
            if name == _CODEBOOK:
                self.codebook.copy_(self.picture_layout.by_token(tensor))
            if not name.startswith("model.vqmodel.") and not name.endswith(".inv_freq"):
                yield name, tensor


_CODEBOOK = "model.vqmodel.quantize.embedding.weight"
_SHARDS = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def _place(name: str) -> tuple[str, tuple]:
    """A checkpoint's parameter: its name here, and its shard of a merged one."""
    *path, part, kind = name.split(".")
    if part not in _SHARDS:
        return name, ()
    merged, shard = _SHARDS[part]
    return ".".join((*path, merged, kind)), (shard,)
