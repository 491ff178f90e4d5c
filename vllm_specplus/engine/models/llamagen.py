"""LlamaGen in vLLM, with classifier-free guidance inside the model.

A request is its label's token, or the embeddings of its caption; what is generated are codes.
With guidance every position is computed twice, once behind the condition and once behind "any",
by two sets of attention layers: each keeps its own keys and values, in the *same* blocks and
slots of the request, because only the condition's positions differ. One request therefore stays
one request for vLLM. The two branches are scheduled, preempted, resumed, cached by prefix and
freed together, and drafts are verified on what both say.

Guidance mixes logits, ``any + scale (condition - any)``. The output layer is linear, so what is
mixed here are the normalised states below it, and it runs once. ``guidance`` holds the
scale of every row of the batch; our model runners write it, and under any other it keeps
the model's own scale.

A caption is read without padding, so that every request's picture begins elsewhere.
``picture_starts`` holds that position for every row; our model runners write it, too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.sequence import IntermediateTensors

from vllm_specplus.engine.models.loading import load_blocks
from vllm_specplus.image.llamagen import (
    LABELS,
    PROJECTION,
    UNCONDITIONAL,
    LlamaGenConfig,
    project,
    rotary_2d,
    rotate,
)


class GuidedAttention(nn.Module):
    def __init__(self, config: LlamaGenConfig, vllm_config: VllmConfig, layer: int, prefix: str):
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // ranks
        self.kv_heads = max(config.num_key_value_heads // ranks, 1)
        self.wqkv = QKVParallelLinear(
            config.hidden_size, config.head_dim, config.num_attention_heads,
            config.num_key_value_heads, bias=False, prefix=f"{prefix}.wqkv",
        )  # fmt: skip
        self.wo = RowParallelLinear(
            config.hidden_size, config.hidden_size, bias=False, prefix=f"{prefix}.wo"
        )
        # vLLM tells caches apart by the one number in a layer's name.
        numbers = [layer]
        if config.guidance_scale is not None:
            numbers.append(config.num_hidden_layers + layer)
        self.branches = nn.ModuleList(
            Attention(
                self.heads, config.head_dim, config.head_dim**-0.5, num_kv_heads=self.kv_heads,
                cache_config=vllm_config.cache_config, prefix=f"layers.{number}.attn",
            )
            for number in numbers
        )  # fmt: skip

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.wqkv(x)
        sizes = [self.heads * self.head_dim, *(self.kv_heads * self.head_dim,) * 2]
        q, k, v = qkv.split(sizes, dim=-1)
        q, k = (rotate(part.unflatten(-1, (-1, self.head_dim)), turn).flatten(1) for part in (q, k))
        parts = zip(*(part.chunk(len(self.branches)) for part in (q, k, v)), strict=True)
        outs = [attention(*part) for attention, part in zip(self.branches, parts, strict=True)]
        return self.wo(outs[0] if len(outs) == 1 else torch.cat(outs))[0]


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig, vllm_config: VllmConfig, layer: int, prefix: str):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = GuidedAttention(config, vllm_config, layer, f"{prefix}.attention")
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.w13 = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False, prefix=f"{prefix}.w13"
        )
        self.silu_and_mul = SiluAndMul()
        self.w2 = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, prefix=f"{prefix}.w2"
        )

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        inner, _ = self.w13(self.ffn_norm(x))
        return x + self.w2(self.silu_and_mul(inner))[0]


class Backbone(nn.Module):
    """What this model and that of latents have in common."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: LlamaGenConfig = vllm_config.model_config.hf_config
        self.config = config
        self.layers = nn.ModuleList(
            Block(config, vllm_config, i, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("turn", rotary_2d(config), persistent=False)

    def states(
        self, x: torch.Tensor, positions: torch.Tensor, anything: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Normalised states [n, hidden] of inputs ``x`` [n, hidden] at ``positions`` int64 [n] of
        the picture, 0 for its condition; with ``anything`` [hidden] or [n, hidden], what the
        condition "any" is read as, of both branches."""
        turn = self.turn[positions]
        if anything is not None:
            x = torch.cat((x, torch.where(positions[:, None] == 0, anything, x)))
            turn = torch.cat((turn, turn))
        for layer in self.layers:
            x = layer(x, turn)
        x = self.norm(x)
        return (x,) if anything is None else x.chunk(2)


class CodeBackbone(Backbone):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix)
        self.embeddings = VocabParallelEmbedding(self.config.vocab_size, self.config.hidden_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings(input_ids)


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "guidance": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class LlamaGenModel(CodeBackbone):
    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        guidance: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.guidance_scale is None:
            return self.states(x, positions, None)[0]
        last = torch.full_like(positions[:1], self.config.vocab_size - 1)
        label, other = self.states(x, positions, self.embed_input_ids(last))
        return other + guidance.to(label.dtype) * (label - other)


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "guidance": {0: "b"},
        "picture_starts": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class CaptionedLlamaGenModel(CodeBackbone):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        self.register_buffer(
            "anything", torch.zeros(config.caption_tokens, config.hidden_size), persistent=False
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        guidance: torch.Tensor,
        picture_starts: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        behind = positions - picture_starts
        in_picture = (behind + 1).clamp(0, len(self.turn) - 1)
        if self.config.guidance_scale is None:
            return self.states(x, in_picture, None)[0]
        last = len(self.anything) - 1
        anything = self.anything[(behind + 1 + last).clamp(0, last)]
        caption, other = self.states(x, in_picture, anything)
        return other + guidance.to(caption.dtype) * (caption - other)


class LlamaGenForClassToImage(nn.Module):
    backbone = LlamaGenModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: LlamaGenConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = self.backbone(vllm_config=vllm_config, prefix=prefix)
        self.output = ParallelLMHead(config.codebook_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config.codebook_size)
        self.register_buffer(
            "codebook", torch.zeros(config.codebook_size, config.codebook_dim), persistent=False
        )
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer(
            "guidance", torch.full((rows, 1), config.guidance_scale or 1.0, dtype=torch.float32),
            persistent=False,
        )  # fmt: skip

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        guidance = self.guidance[: positions.shape[0]]
        return self.model(input_ids, positions, guidance, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.logits_processor(self.output, hidden_states)
        if logits is None:
            return None
        # Labels are never generated.
        labels = self.config.vocab_size - self.config.codebook_size
        return F.pad(logits, (0, labels), value=float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        given = dict(weights)
        given["embeddings.weight"] = self.table(given)
        self.codebook.copy_(given.pop("codebook"))
        head = {name: given.pop(name) for name in list(given) if name.startswith("output.")}
        inner = {f"model.{name}": tensor for name, tensor in given.items()}
        return load_blocks(self, (head | inner).items(), place)

    def table(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """[vocab, hidden] what tokens are read as; takes what it needs out of ``given``."""
        return torch.cat([given.pop(name) for name in ("tok_embeddings.weight", LABELS)])


class LlamaGenForTextToImage(LlamaGenForClassToImage):
    backbone = CaptionedLlamaGenModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        starts = torch.zeros(len(self.guidance), dtype=torch.int64)
        self.register_buffer("picture_starts", starts, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = positions.shape[0]
        guidance, starts = self.guidance[:rows], self.picture_starts[:rows]
        return self.model(input_ids, positions, guidance, starts, inputs_embeds)

    def table(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        # Captions come projected, by the renderer.
        parts = [given.pop(name).float() for name in (UNCONDITIONAL, *PROJECTION)]
        self.model.anything.copy_(project(*parts))
        codes = given.pop("tok_embeddings.weight")
        # The token that stands for a caption's positions is never read.
        return F.pad(codes, (0, 0, 0, self.config.vocab_size - len(codes)))


def place(name: str) -> tuple[str, tuple[int, ...]]:
    """A checkpoint's parameter: its name here, and its shard of a merged one."""
    for i, part in enumerate(("w1", "w3")):
        if f".feed_forward.{part}." in name:
            return name.replace(f"feed_forward.{part}", "w13"), (i,)
    return name.replace("feed_forward.", ""), ()
