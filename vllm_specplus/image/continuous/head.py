"""The diffusion head of MAR (arXiv 2406.11838, section 4.3): residual layers modulated by time and
condition. Parameters carry the names of the public checkpoints (``diffloss.net.*``)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

#: Sine and cosine features of a time.
FREQUENCIES = 128
EPS = 1e-6


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), _square(width))
        powers = -math.log(10_000) * torch.arange(FREQUENCIES) / FREQUENCIES
        self.register_buffer("frequencies", powers.exp(), persistent=False)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        angle = times[:, None].float() * self.frequencies
        features = torch.cat((angle.cos(), angle.sin()), -1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def _square(width: int) -> nn.Linear:
    return nn.Linear(width, width)


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(_square(width), nn.SiLU(), _square(width))
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift)


class MLPHead(nn.Module):
    """A :class:`~vllm_specplus.image.continuous.chain.DiffusionHead` of ``depth`` layers of
    ``width`` for latents of ``size`` channels."""

    def __init__(self, size: int, condition: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(size, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * size)
        # As in adaLN-Zero (arXiv 2212.09748): every layer starts as the identity.
        modulations = [block.adaLN_modulation for block in self.res_blocks]
        for linear in (*(m[1] for m in modulations), self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.time_embed(times) + self.cond_embed(condition)
        x = self.input_proj(x.to(y.dtype))
        for block in self.res_blocks:
            x = block(x, y)
        noise, fraction = self.final_layer(x, y).chunk(2, -1)
        return noise, fraction
