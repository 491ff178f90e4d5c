"""From words to a prompt, and from what a request generated to the bytes of a file."""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from vllm_specplus.image import chameleon
from vllm_specplus.image.captions import CaptionEncoder
from vllm_specplus.image.continuous.causal import CausalLatentsConfig
from vllm_specplus.image.continuous.vae import KLDecoder, LatentVAE, load_vae
from vllm_specplus.image.llamagen import LlamaGenConfig
from vllm_specplus.image.vq import VQModel, to_bytes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:
    from transformers import ChameleonConfig
    from vllm.inputs import EmbedsPrompt, TokensPrompt
    from vllm.outputs import CompletionOutput

#: Of what is not drawn yet.
GREY = 128


class Output(Protocol):
    """What a request has generated so far, as vLLM's ``CompletionOutput`` has it."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Any:
        """None, or of each token the logprob of some ids, each with an attribute ``logprob``."""


def latents_of(output: Output) -> torch.Tensor:
    """float32 [n, d]: what a model of latents has generated. They travel as logprobs, channel i
    as that of token id i + 1."""
    positions = output.logprobs or []
    return torch.tensor(
        [[position[i].logprob for i in range(1, len(position))] for position in positions]
    )  # fmt: skip


class Channel(NamedTuple):
    """As far as it matters here, vLLM's ``Logprob``."""

    logprob: float


def as_logprobs(latents: torch.Tensor) -> list[dict[int, Channel]]:
    """``latents`` float32 [n, d] as :func:`latents_of` finds them; exactly."""
    return [dict(enumerate(map(Channel, (0.0, *each)))) for each in latents.tolist()]


def encoded(pixels: np.ndarray, kind: str = "png", quality: int = 100) -> bytes:
    """A file of ``pixels`` uint8 [height, width, 3] or [height, width]: ``png``, or ``jpeg`` or
    ``webp`` of a ``quality`` from 0 to 100."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({} if kind == "png" else {"quality": quality}))
    return out.getvalue()


def own_sampling(folder: str | Path) -> dict[str, Any]:
    """Sampling parameters that a model's ``generation_config.json`` names, which vLLM's own routes
    take from there too."""
    file = Path(folder) / "generation_config.json"
    said = json.loads(file.read_text()) if file.is_file() else {}
    return {key: said[key] for key in ("temperature", "top_k", "top_p") if key in said}


class Pictures(ABC):
    """One model's: what a prompt means, and what its output is as a picture."""

    defaults: dict[str, Any]
    """Sampling parameters of requests that name none."""

    @abstractmethod
    def request(
        self, prompt: str, size: str | None
    ) -> tuple[TokensPrompt | EmbedsPrompt, dict[str, Any]]:
        """What vLLM is asked for a picture of ``size`` ("512x512"; None: the model's own), and the
        sampling parameters that it needs beside those that are asked for. ValueError with one
        sentence if there is no such picture. Takes its time where a text encoder reads."""

    def png(self, output: CompletionOutput) -> bytes:
        return encoded(self.pixels(output))

    def pixels(self, output: Output) -> np.ndarray:
        """uint8 [height, width, 3], or [height, width] of one channel, of a whole picture."""
        return _image(self.decode(self.tokens(output)[None]))

    def beginning(self, output: Output, most: int) -> np.ndarray | None:
        """:meth:`pixels` of a picture of ``most`` tokens as far as its rows are complete, above
        grey; None: not one is."""
        rows, of = self._rows(output, most)
        if not rows:
            return None
        pixels = _image(self._decode_rows(output, rows))
        rest = len(pixels) // rows * (of - rows)
        return np.concatenate((pixels, np.full((rest, *pixels.shape[1:]), GREY, np.uint8)))

    @abstractmethod
    def _rows(self, output: Output, most: int) -> tuple[int, int]:
        """Rows of tokens that are complete, and rows in all."""

    @abstractmethod
    def _decode_rows(self, output: Output, rows: int) -> torch.Tensor:
        """:meth:`decode` of as many rows of one request."""

    @abstractmethod
    def tokens(self, output: Output) -> torch.Tensor:
        """What a request has generated: codes, or [n, d] latents."""

    @abstractmethod
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [B, channels, height, width] in about [-1, 1] of :meth:`tokens` of B requests."""


def _image(decoded: torch.Tensor) -> np.ndarray:
    """The first of the pictures that :meth:`Pictures.decode` returns, as bytes."""
    return to_bytes(decoded)[0].squeeze(-1).numpy()


class OneSizePictures(Pictures):
    """All pictures have one size; a prompt names a class."""

    defaults = {"temperature": 1.0, "top_k": 0}  # noqa: RUF012

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
            raise ValueError(
                f"prompt {quoted(prompt)} names no class of this model (it has {some})"
            )
        return self.config.label_token(label)

    def prompt(self, text: str) -> TokensPrompt | EmbedsPrompt:
        """What the model is asked; ValueError if it cannot make pictures of that."""
        return {"prompt_token_ids": [self.token(text)]}

    def request(
        self, prompt: str, size: str | None
    ) -> tuple[TokensPrompt | EmbedsPrompt, dict[str, Any]]:
        own = f"{self.side}x{self.side}"
        if size not in (None, own):
            raise ValueError(f"size {quoted(size)}: this model makes {own}")
        return self.prompt(prompt), self.sampling

    def _rows(self, output: Output, most: int) -> tuple[int, int]:
        return len(output.token_ids) // self.config.grid_size, self.config.grid_size


class CodePictures(OneSizePictures):
    def __init__(self, config: LlamaGenConfig, folder: str):
        self.vq = VQModel.load(folder)
        super().__init__(config, len(self.vq.config.multipliers) - 1)
        self.defaults = self.defaults | own_sampling(folder)
        self.sampling["ignore_eos"] = True

    def tokens(self, output: Output) -> torch.Tensor:
        return torch.tensor(list(output.token_ids))

    def _decode_rows(self, output: Output, rows: int) -> torch.Tensor:
        return self.decode(self.tokens(output)[None, : rows * self.config.grid_size])

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vq.decode(tokens.unflatten(1, (-1, self.config.grid_size)))


class CaptionPictures(CodePictures):
    """A prompt is a caption."""

    def __init__(self, config: LlamaGenConfig, folder: str):
        super().__init__(config, folder)
        self._encoder = CaptionEncoder(folder, config.caption_tokens, config.caption_size)

    def prompt(self, text: str) -> EmbedsPrompt:
        return {"prompt_embeds": self._encoder.states(text)}


class LatentPictures(OneSizePictures):
    def __init__(self, config: CausalLatentsConfig, vae: LatentVAE | KLDecoder):
        self.vae = vae
        super().__init__(config, len(vae.config.multipliers) - 1)
        self.sampling["logprobs"] = config.size

    def tokens(self, output: Output) -> torch.Tensor:
        return latents_of(output)

    def _decode_rows(self, output: Output, rows: int) -> torch.Tensor:
        # The decoder reads squares: what is not drawn yet is 0 there, and cut off.
        latents = torch.zeros(self.config.grid_size**2, self.config.size)
        latents[: len(output.token_ids)] = self.tokens(output)
        whole = self.decode(latents[None])
        return whole[..., : rows * (whole.shape[2] // self.config.grid_size), :]

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(tokens)


class TextPictures(Pictures):
    """Of Chameleon, Anole and Lumina-mGPT: a prompt is a text. Pictures have one size, or any that
    Lumina-mGPT has tokens for."""

    def __init__(self, config: ChameleonConfig, folder: str):
        from transformers import AutoTokenizer

        self.layout = chameleon.Layout.of(config)
        self.decoder = chameleon.load_decoder(config, folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        layout = self.layout
        self._not_words = {layout.begin, layout.end, config.image_token_id, *layout.codes.tolist()}
        # As the reference codes draw.
        self.defaults = {"temperature": 0.7, "top_p": 0.9}
        self._unit = chameleon.pixels_of_code(config)
        self._own_size = f"{self.layout.side * self._unit}x{self.layout.side * self._unit}"
        if self.layout.size is not None:
            self.defaults = {"temperature": 1.0, "top_k": 2000}
            self._unit *= chameleon.PAIR
            self._own_size = f"{chameleon.USUAL * self._unit}x{chameleon.USUAL * self._unit}"

    def request(self, prompt: str, size: str | None) -> tuple[TokensPrompt, dict[str, Any]]:
        layout, size = self.layout, size or self._own_size
        header, rows, columns = [], layout.side, layout.side
        if layout.size is not None:
            width, height = self._units(size)
            header = [layout.size + height, layout.size + width]
            rows, columns = height * chameleon.PAIR, width * chameleon.PAIR
            prompt = f"Generate an image of {size} according to the following prompt:\n{prompt}"
        elif size != self._own_size:
            raise ValueError(f"size {quoted(size)}: this model makes {self._own_size}")
        text = self._tokenizer.encode(prompt, add_special_tokens=False)
        if not self._not_words.isdisjoint(text):
            raise ValueError("the prompt has tokens of pictures: only words can be given")
        ids = [layout.opening, *text, layout.turn, layout.begin, *header]
        most = layout.length(rows, columns)
        sampling = {"max_tokens": most, "ignore_eos": True, "detokenize": False}
        return {"prompt_token_ids": ids}, sampling

    def _units(self, size: str) -> list[int]:
        """Width and height, as their tokens count."""
        named = re.fullmatch(r"\d{1,9}x\d{1,9}", size)
        sides = [int(side) for side in size.split("x")] if named else []
        most = chameleon.LARGEST * self._unit
        if not sides or any(side % self._unit or not 0 < side <= most for side in sides):
            raise ValueError(
                f"size {quoted(size)}: this model makes WIDTHxHEIGHT, multiples of {self._unit} up "
                f"to {most}"
            )
        return [side // self._unit for side in sides]

    def tokens(self, output: Output) -> torch.Tensor:
        """int64 [rows, columns]."""
        return torch.from_numpy(self.layout.grid(np.array(output.token_ids)))

    def _rows(self, output: Output, most: int) -> tuple[int, int]:
        row = self._row_tokens(output)
        return (len(output.token_ids) // row, most // row) if row else (0, 0)

    def _row_tokens(self, output: Output) -> int:
        """0: not one row is complete."""
        layout, ids = self.layout, list(output.token_ids)
        if layout.line is None:
            return layout.side
        return ids.index(layout.line) + 1 if layout.line in ids else 0

    def _decode_rows(self, output: Output, rows: int) -> torch.Tensor:
        ids = np.array(output.token_ids)[: rows * self._row_tokens(output)]
        return self.decode(torch.from_numpy(self.layout.grid(ids))[None])

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder.decode(tokens)


def pictures_of(config: Any, folder: str) -> Pictures | None:
    """For the model in ``folder``, if it makes pictures."""
    if isinstance(config, CausalLatentsConfig):  # which is a LlamaGen's, too
        return LatentPictures(config, load_vae(folder))
    if getattr(config, "model_type", None) == chameleon.MODEL_TYPE:
        return TextPictures(config, folder)
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
