"""The VQ model of LlamaGen (a VQGAN, arXiv 2012.09841): pictures to codes and back.

Parameters carry the names of the public checkpoints (``vq_ds16_c2i`` and its like).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import weights
from vllm_specplus.strict import StrictModel


class VQConfig(StrictModel):
    """The defaults are the public 16-fold model's."""

    codebook_size: int = 16384
    codebook_dim: int = 8
    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Of the channels, by resolution; between two of them pictures are halved."""
    blocks: int = 2
    """Residual blocks by resolution; the decoder has one more."""
    latent_channels: int = 256


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Resolution(nn.Module):
    """Residual blocks, attention at the coarsest resolution, a change of resolution."""

    def __init__(self, channels: int, out: int, blocks: int, coarsest: bool):
        super().__init__()
        self.res = nn.ModuleList(Residual(out if i else channels, out) for i in range(blocks))
        self.attn = nn.ModuleList(SelfAttention(out) for _ in range(blocks if coarsest else 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        (Residual(channels, channels), SelfAttention(channels), Residual(channels, channels))
    )


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.channels * m for m in (1, *config.multipliers)]
        last = len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            block = Resolution(widths[i], widths[i + 1], config.blocks, i == last)
            if i < last:
                block.downsample = Down(widths[i + 1])
            self.conv_blocks.append(block)
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VQConfig, attention: bool = True):
        """``attention``: at the coarsest resolution, too, and not in the middle alone?"""
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = attention and i == 0
            block = Resolution(widths[max(i - 1, 0)], width, config.blocks + 1, attends)
            if i < last:
                block.upsample = Up(width)
            self.conv_blocks.append(block)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def vectors(self) -> torch.Tensor:
        """float32 [codes, dim] of length 1."""
        return F.normalize(self.embedding.weight, dim=-1)


class VQModel(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, rows, columns, dim] of length 1, before they are quantized;
        ``pictures`` float32 [B, channels, height, width] in [-1, 1]."""
        return F.normalize(self.quant_conv(self.encoder(pictures)).movedim(1, -1), dim=-1)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, rows, columns]: the nearest by angle."""
        return (self.latents(pictures) @ self.quantize.vectors().T).argmax(-1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [B, channels, height, width] in about [-1, 1] of int64 [B, r, c]."""
        return self.decode_latents(self.quantize.vectors()[codes])

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents.movedim(-1, 1)))

    @classmethod
    def load(cls, folder: str | Path) -> VQModel:
        """Of ``vq/config.json`` and ``vq/model.safetensors`` in a model's folder."""
        folder = Path(folder) / "vq"
        config = VQConfig.model_validate_json((folder / "config.json").read_text())
        return weights.load(cls(config), folder / "model.safetensors")

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        weights.save(self, folder / "vq" / "model.safetensors", dtype)
        (folder / "vq" / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, height, width, channels] of pictures in [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)


def taming_tensors(tensors: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Of a checkpoint in the names of taming-transformers and latent diffusion, what decodes:
    ``decoder.*`` in the names of :class:`Decoder`, of ``levels`` resolutions, and
    ``post_quant_conv.*``."""
    return {
        _own_name(name, levels): tensor
        for name, tensor in tensors.items()
        if name.startswith(("decoder.", "post_quant_conv."))
    }


def _own_name(name: str, levels: int) -> str:
    """They count resolutions from the finest on, and name the middle's parts."""
    for i, part in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{part}.", f".mid.{i}.")
    found = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name)
    if found is None:
        return name
    level, part, rest = found.groups()
    block = f"decoder.conv_blocks.{levels - 1 - int(level)}"
    return f"{block}.{'res' if part == 'block' else part}.{rest}"
