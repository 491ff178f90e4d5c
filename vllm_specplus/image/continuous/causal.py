"""A causal model of latents: LlamaGen's backbone, with a diffusion head for its output layer.

Latents follow a class label in raster order. The input is a linear layer's view of a latent
where LlamaGen looks up a code; what the backbone says after a position conditions the head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image.continuous.chain import Schedule
from vllm_specplus.image.continuous.head import MLPHead
from vllm_specplus.image.llamagen import Block, LabelEmbedding, LlamaGenConfig, RMSNorm, rotary_2d


class CausalLatents(nn.Module):
    """A :class:`~vllm_specplus.image.continuous.decoding.CausalModel`."""

    def __init__(self, config: LlamaGenConfig, size: int, head_width: int, head_depth: int):
        """``config`` without its codes; latents of ``size`` channels."""
        super().__init__()
        self.config, self.size = config, size
        self.cls_embedding = LabelEmbedding(config)
        self.z_proj = nn.Linear(size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = MLPHead(size, config.hidden_size, head_width, head_depth)
        self.register_buffer("turn", rotary_2d(config), persistent=False)

    def conditions(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B, n + 1, hidden] after the label and each of ``latents`` float32 [B, n, size]."""
        label = self.cls_embedding.embedding_table(labels)[:, None]
        x = torch.cat((label, self.z_proj(latents.to(label.dtype))), 1)
        turn = self.turn[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, turn, 0.0)
        return self.norm(x)

    def loss(
        self, latents: torch.Tensor, labels: torch.Tensor, schedule: Schedule, repeats: int = 4
    ) -> torch.Tensor:
        """Error of what is predicted plus a little of the chain's own bound, which is what
        teaches the variances (arXiv 2102.09672, equation 16), at ``repeats`` random steps of
        ``schedule`` per latent."""
        conditions = self.conditions(latents[:, :-1], labels).flatten(0, 1).repeat(repeats, 1)
        clean = latents.flatten(0, 1).repeat(repeats, 1)
        step = torch.randint(schedule.steps, (len(clean),))
        noise = torch.randn_like(clean)
        x = schedule.noised(step, clean, noise)
        said, fraction = self.head(x, schedule.times[step], conditions)
        bound = schedule.bound(step, x, clean, said.detach(), fraction)
        return F.mse_loss(said, schedule.aim(step, clean, noise)) + 0.001 * bound.mean()
