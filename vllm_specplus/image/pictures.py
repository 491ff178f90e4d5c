"""From words to a prompt, and from what a request generated to PNG."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vllm_specplus.image.captions import CaptionEncoder
from vllm_specplus.image.continuous.causal import CausalLatentsConfig
from vllm_specplus.image.continuous.vae import load_vae
from vllm_specplus.image.llamagen import LlamaGenConfig
from vllm_specplus.image.vq import VQModel, to_bytes

if TYPE_CHECKING:
    from vllm.inputs import EmbedsPrompt, TokensPrompt
    from vllm.outputs import CompletionOutput


def latents_of(output: CompletionOutput) -> torch.Tensor:
    """float32 [n, d]: what a model of latents has generated. They travel as logprobs, channel i
    as that of token id i + 1."""
    places = output.logprobs or []
    return torch.tensor(
        [[place[i].logprob for i in range(1, len(place))] for place in places]
    )  # fmt: skip


class Pictures(ABC):
    """One model's: what a prompt means, and what its output is as a picture."""

    sampling: dict[str, Any]
    """Parameters that every request needs, beside those that are asked for."""

    def __init__(self, config: LlamaGenConfig, halvings: int):
        """``halvings``: of the picture's side on its way to the grid."""
        self.config = config
        self.side = config.grid_size * 2**halvings
        """Pixels of a picture's side."""
        self._labels = {name: int(i) for i, name in config.id2label.items()}
        self.sampling = {"max_tokens": config.grid_size**2, "detokenize": False}

    def token(self, prompt: str) -> int:
        """The token of the class that ``prompt`` names; ValueError if there is none."""
        label = self._labels.get(prompt.strip())
        if label is None:
            some = ", ".join(repr(name) for name in list(self._labels)[:12])
            raise ValueError(f"prompt {prompt!r} names no class of this model (it has {some})")
        return self.config.label_token(label)

    def prompt(self, text: str) -> TokensPrompt | EmbedsPrompt:
        """What vLLM is asked for pictures of ``text``; ValueError if this model cannot make them.
        Takes its time where a text encoder reads it."""
        return {"prompt_token_ids": [self.token(text)]}

    def png(self, output: CompletionOutput) -> bytes:
        pixels = to_bytes(self.decode(self.tokens(output)[None]))[0].squeeze(-1).numpy()
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    @abstractmethod
    def tokens(self, output: CompletionOutput) -> torch.Tensor:
        """What a request has generated: [n] codes, or [n, d] latents."""

    @abstractmethod
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [B, channels, height, width] in about [-1, 1] of :meth:`tokens` of B requests."""


class CodePictures(Pictures):
    def __init__(self, config: LlamaGenConfig, folder: str):
        self.vq = VQModel.load(folder)
        super().__init__(config, len(self.vq.config.multipliers) - 1)
        self.sampling["ignore_eos"] = True

    def tokens(self, output: CompletionOutput) -> torch.Tensor:
        return torch.tensor(list(output.token_ids))

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vq.decode(tokens.unflatten(1, (-1, self.config.grid_size)))


class CaptionPictures(CodePictures):
    def __init__(self, config: LlamaGenConfig, folder: str):
        super().__init__(config, folder)
        self._encoder = CaptionEncoder(folder, config.caption_tokens, config.caption_size)

    def prompt(self, text: str) -> EmbedsPrompt:
        return {"prompt_embeds": self._encoder.states(text)}


class LatentPictures(Pictures):
    def __init__(self, config: CausalLatentsConfig, folder: str):
        self.vae = load_vae(folder)
        super().__init__(config, len(self.vae.config.multipliers) - 1)
        self.sampling["logprobs"] = config.size

    def tokens(self, output: CompletionOutput) -> torch.Tensor:
        return latents_of(output)

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(tokens)


def pictures_of(config: Any, folder: str) -> Pictures | None:
    """For the model in ``folder``, if it makes pictures."""
    if isinstance(config, CausalLatentsConfig):  # which is a LlamaGen's, too
        return LatentPictures(config, folder)
    if isinstance(config, LlamaGenConfig):
        return (CodePictures if config.caption_size is None else CaptionPictures)(config, folder)
    return None


def load_pictures(folder: str | Path) -> Pictures | None:
    """The same, by the folder alone."""
    said = json.loads((Path(folder) / "config.json").read_text())
    for kind in (CausalLatentsConfig, LlamaGenConfig):
        if said.get("model_type") == kind.model_type:
            return pictures_of(kind(**said), str(folder))
    return None
