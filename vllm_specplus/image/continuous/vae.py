"""Pictures to latents and back: an autoencoder whose latents are noisy on purpose.

The decoder never sees a clean latent: a fixed share of the variance is noise (sigma-VAE, arXiv
2412.08635, section 3.3, whose reason is that errors of an autoregressive model do not add up
then). That share is where a chain of :class:`~vllm_specplus.image.continuous.chain.Schedule`
ends, so that its last step has a sigma which two models can agree within.

Encoder and decoder are those of the VQ model (``image/vq.py``), without its codebook.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import nn

from vllm_specplus.image import weights
from vllm_specplus.image.vq import Decoder, Encoder
from vllm_specplus.strict import StrictModel


class VAEConfig(StrictModel):
    size: int
    """Channels of a latent."""
    signal: float
    """Share of a noisy latent's variance that is signal."""
    image_channels: int = 1
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 1, 2)
    blocks: int = 1
    latent_channels: int = 64


class LatentVAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.to_latent = nn.Conv2d(config.latent_channels, config.size, 1)
        # Mean 0 and variance 1 over the data, per channel: what the schedule assumes.
        self.scale = nn.BatchNorm2d(config.size, affine=False)
        self.from_latent = nn.Conv2d(config.size, config.latent_channels, 1)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Clean latents float32 [B, n, size] in raster order of pictures float32
        [B, channels, height, width] in [-1, 1]."""
        return self.scale(self.to_latent(self.encoder(pictures))).flatten(2).transpose(1, 2)

    def noisy(self, clean: torch.Tensor) -> torch.Tensor:
        """What chains end at and the decoder reads."""
        signal = self.config.signal
        return signal**0.5 * clean + (1 - signal) ** 0.5 * torch.randn_like(clean)

    def decode(self, noisy: torch.Tensor) -> torch.Tensor:
        """Pictures in about [-1, 1] of latents float32 [B, n, size], n a square."""
        return self.decoder(self.from_latent(_grid(noisy)))

    def save(self, folder: Path) -> None:
        """As ``vae/`` of a model's folder, in half precision."""
        _save(self, folder)


class KLConfig(StrictModel):
    """The defaults are those of MAR's autoencoder, "KL-16"."""

    size: int = 16
    factor: float = 0.2325
    """What latents were multiplied with, to have variance 1."""
    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2

    @property
    def latent_channels(self) -> int:
        return self.size


class KLDecoder(nn.Module):
    """The half of latent diffusion's autoencoder (arXiv 2112.10752) that MAR's pictures need: its
    latents have no noise of their own to be read with."""

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv2d(config.size, config.size, 1)
        self.decoder = Decoder(config, attention=False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """As :meth:`LatentVAE.decode`."""
        grid = _grid(latents) / self.config.factor
        return self.decoder(self.post_quant_conv(grid))

    def save(self, folder: Path) -> None:
        _save(self, folder)


def _grid(latents: torch.Tensor) -> torch.Tensor:
    """[B, size, rows, columns] of [B, n, size], n a square."""
    side = int(latents.shape[1] ** 0.5)
    return latents.transpose(1, 2).unflatten(2, (side, side))


def _save(model: nn.Module, folder: Path) -> None:
    weights.save(model, folder / "vae" / "model.safetensors")
    (folder / "vae" / "config.json").write_text(model.config.model_dump_json(indent=2) + "\n")


def load_vae(folder: str | Path) -> LatentVAE | KLDecoder:
    """Of ``vae/config.json`` and ``vae/model.safetensors`` in a model's folder."""
    folder = Path(folder) / "vae"
    configs = TypeAdapter(VAEConfig | KLConfig)
    config = configs.validate_json((folder / "config.json").read_text())
    kind = LatentVAE if isinstance(config, VAEConfig) else KLDecoder
    return weights.load(kind(config), folder / "model.safetensors")
