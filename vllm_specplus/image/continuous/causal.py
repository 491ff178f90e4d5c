"""A causal model of latents: LlamaGen's backbone, with a diffusion head for its output layer.

Latents follow a class label in raster order. The input is a linear layer's view of a latent
where LlamaGen looks up a code; what the backbone says after a position conditions the head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import weights
from vllm_specplus.image.continuous.chain import Schedule, head_loss
from vllm_specplus.image.continuous.head import MLPHead
from vllm_specplus.image.llamagen import (
    Block,
    LabelEmbedding,
    LlamaGenConfig,
    RMSNorm,
    rotary_2d,
    rotate,
)

MODEL_TYPE = "causal_latents"
ARCHITECTURE = "CausalLatentsForClassToImage"


class CausalLatentsConfig(LlamaGenConfig):
    """As Hugging Face's tools and vLLM read it. Token ids: 0 stands for any latent, then
    class labels, then the label for "any"."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        size: int = 4,
        head_width: int = 256,
        head_depth: int = 3,
        steps: int = 8,
        end: int = 0,
        prediction: Literal["noise", "velocity"] = "velocity",
        guidance_scale: float | None = None,
        **kwargs,
    ):
        """``size``: channels of a latent. ``steps``, ``end`` and ``prediction`` are the
        schedule's it was trained with."""
        self.size = size
        self.head_width = head_width
        self.head_depth = head_depth
        self.steps = steps
        self.end = end
        self.prediction = prediction
        kwargs = {"architectures": [ARCHITECTURE]} | kwargs
        kwargs |= {"codebook_size": 1, "guidance_scale": guidance_scale}
        super().__init__(**kwargs)

    def schedule(self) -> Schedule:
        return Schedule(self.steps, end=self.end, prediction=self.prediction)


class CausalLatents(nn.Module):
    """A :class:`~vllm_specplus.image.continuous.decoding.CausalModel`."""

    def __init__(self, config: CausalLatentsConfig):
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config)
        self.z_proj = nn.Linear(config.size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = MLPHead(config.size, config.hidden_size, config.head_width, config.head_depth)
        self.register_buffer("turn", rotary_2d(config), persistent=False)

    def conditions(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B, n + 1, hidden] after the label and each of ``latents`` float32 [B, n, size]."""
        label = self.cls_embedding.embedding_table(labels)[:, None]
        x = torch.cat((label, self.z_proj(latents.to(label.dtype))), 1)
        turn = self.turn[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, turn, 0.0)
        return self.norm(x)

    def begin(self, labels: torch.Tensor, length: int) -> CachedSession:
        return CachedSession(self, labels, length)

    def loss(
        self, latents: torch.Tensor, clean: torch.Tensor, labels: torch.Tensor,
        schedule: Schedule, repeats: int = 4,
    ) -> torch.Tensor:  # fmt: skip
        """:func:`~vllm_specplus.image.continuous.chain.head_loss` of all latents: ``clean``
        among ``latents``, [B, n, size], as noisy as the schedule's end leaves them."""
        conditions = self.conditions(latents[:, :-1], labels).flatten(0, 1)
        return head_loss(self.head, schedule, conditions, clean.flatten(0, 1), repeats)

    @classmethod
    def load(cls, folder: str | Path) -> CausalLatents:
        """Of a folder that :meth:`save` wrote, in float32."""
        folder = Path(folder)
        config = CausalLatentsConfig(**json.loads((folder / "config.json").read_text()))
        return weights.load(cls(config), folder / "model.safetensors")

    def save(self, folder: Path) -> None:
        """A folder that vLLM serves, in half precision."""
        weights.save(self, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")


class CachedSession:
    """A :class:`~vllm_specplus.image.continuous.decoding.Session` that keeps keys and values.

    Keys of a position are right once its input, the latent before it, is final; ``known`` tells how
    many are. What is behind them is overwritten before it is looked at.
    """

    def __init__(self, model: CausalLatents, labels: torch.Tensor, length: int):
        config, weight = model.config, model.norm.weight
        heads = config.num_key_value_heads
        shape = (2, config.num_hidden_layers, len(labels), length, heads, config.head_dim)
        self.model, self.length = model, length
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.labels = model.cls_embedding.embedding_table(labels)
        self.known = torch.zeros_like(labels)

    def restart(self, picture: int, label: int) -> None:
        self.labels[picture] = self.model.cls_embedding.embedding_table.weight[label]
        self.known[picture] = 0
        # Behind the mask as well: a weight of 0 times a NaN of another picture is NaN.
        self.cache[:, :, picture] = 0

    def keep(self, known: torch.Tensor) -> None:
        self.known = torch.minimum(self.known, known)

    def conditions(
        self, latents: torch.Tensor, pictures: torch.Tensor, first: torch.Tensor, count: int
    ) -> torch.Tensor:
        start = torch.minimum(self.known[pictures], first)
        # Positions before ``first`` whose keys are missing are read as well.
        count_read = first + count - start
        rows = int(count_read.max())
        offset = torch.arange(rows, device=first.device)
        # Read twice, a position gets the same keys twice.
        position = (start[:, None] + torch.minimum(offset, count_read[:, None] - 1)).clamp(
            max=self.length - 1
        )
        picture = torch.arange(len(pictures), device=first.device)[:, None]
        x = self.model.z_proj(latents[picture, (position - 1).clamp(min=0)])
        x = torch.where((position == 0)[..., None], self.labels[pictures][:, None], x)
        turn = self.model.turn[position.flatten()]
        sees = torch.arange(self.length, device=first.device) <= position[..., None]
        for i, layer in enumerate(self.model.layers):
            x = self._block(layer, x, turn, self.cache[:, i], pictures, position, sees)
        self.known[pictures] = (first + count).clamp(max=self.length)
        wanted = (first - start)[:, None] + torch.arange(count, device=first.device)
        return self.model.norm(x[picture, wanted])

    @staticmethod
    def _block(layer: Block, x, turn, cache, pictures, position, sees) -> torch.Tensor:
        """One layer over ``x`` [P, rows, hidden]; its keys and values go to ``cache``
        [2, B, length, heads, head_dim]."""
        attention = layer.attention
        qkv = attention.wqkv(layer.attention_norm(x))
        qkv = qkv.unflatten(-1, (-1, attention.head_dim)).split(attention.heads, dim=2)
        q, k = (rotate(part.flatten(0, 1), turn).view_as(part) for part in qkv[:2])
        cache[0, pictures[:, None], position] = k
        cache[1, pictures[:, None], position] = qkv[2]
        keys, values = cache[:, pictures].transpose(2, 3)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=sees[:, None],
            enable_gqa=attention.heads[0] != attention.heads[1],
        )  # fmt: skip
        x = x + attention.wo(out.transpose(1, 2).flatten(2))
        return x + layer.feed_forward(layer.ffn_norm(x))
