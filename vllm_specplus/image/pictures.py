"""From words to a class's token, and from codes to PNG."""

from __future__ import annotations

import io

import torch
from PIL import Image

from vllm_specplus.image.llamagen import LlamaGenConfig
from vllm_specplus.image.vq import VQModel, to_bytes


class Pictures:
    """One model's: what a prompt means, and codes to PNG."""

    def __init__(self, config: LlamaGenConfig, folder: str):
        self.config = config
        self.vq = VQModel.load(folder)
        self._labels = {name: int(i) for i, name in config.id2label.items()}

    def token(self, prompt: str) -> int:
        """The token of the class that ``prompt`` names; ValueError if there is none."""
        label = self._labels.get(prompt.strip())
        if label is None:
            some = ", ".join(repr(name) for name in list(self._labels)[:12])
            raise ValueError(f"prompt {prompt!r} names no class of this model (it has {some})")
        return self.config.label_token(label)

    @property
    def codes(self) -> int:
        """Of a picture."""
        return self.config.grid_size**2

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""
        return self.config.grid_size * 2 ** (len(self.vq.config.multipliers) - 1)

    @torch.inference_mode()
    def png(self, codes: list[int]) -> bytes:
        grid = torch.tensor(codes).view(1, self.config.grid_size, self.config.grid_size)
        pixels = to_bytes(self.vq.decode(grid))[0].squeeze(-1).numpy()
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()
