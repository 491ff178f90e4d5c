"""The diffusion head of MAR (arXiv 2406.11838, section 4.3): residual layers modulated by time and
condition. Parameters carry the names of the public checkpoints (``diffloss.net.*``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

#: Sine and cosine features of a time.
FREQUENCIES = 128
EPS = 1e-6
#: Numbers of modulations that are computed ahead, at most: 64 MB.
AHEAD = 1 << 24


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), _square(width))
        # In float32 whatever the dtype of the day: angles are hundreds of radians.
        powers = -math.log(10_000) / FREQUENCIES * torch.arange(FREQUENCIES, dtype=torch.float32)
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

    def modulations(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate, all of the shape of ``y``."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return shift, 1 + scale, gate

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), scale)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = _modulation(width, 2)

    def modulations(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return shift, 1 + scale

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=EPS)
        return self.linear(torch.addcmul(shift, x, scale))


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
        return self._said(self._modulations(y), x)

    def along(self, times: torch.Tensor, condition: torch.Tensor) -> Iterator[Callable]:
        """:meth:`forward` at each of ``times`` int64 [T] in turn, as functions of ``x``. What
        does not depend on it, half of the work, is done for many times at once."""
        time, condition = self.time_embed(times)[:, None], self.cond_embed(condition)
        parts = 3 * len(self.res_blocks) + 2
        ahead = max(AHEAD // (parts * condition.numel()), 1)
        for some in time.split(ahead):
            modulations = self._modulations(some + condition)
            for i in range(len(some)):
                yield partial(self._said, [[part[i] for part in each] for each in modulations])

    def _modulations(self, y: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        return [layer.modulations(y) for layer in (*self.res_blocks, self.final_layer)]

    def _said(self, modulations, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.input_proj(x.to(modulations[0][0].dtype))
        for layer, each in zip((*self.res_blocks, self.final_layer), modulations, strict=True):
            x = layer(x, *each)
        noise, fraction = x.chunk(2, -1)
        return noise, fraction
