"""Chameleon (arXiv 2405.09818) and its kin: text and pictures in one vocabulary.

A picture is a begin token, codes row by row, and an end token. Chameleon and Anole (arXiv
2407.06135) have pictures of one size; in Lumina-mGPT (arXiv 2408.02657) the first two tokens are
height and width, and a token ends every row.

Guidance compares with a text that has only the picture. For Lumina-mGPT that is all from the begin
token on, for Chameleon the token that opens every text before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from vllm_specplus.image import weights
from vllm_specplus.image.convert import read
from vllm_specplus.image.vq import Decoder, VQConfig, taming_tensors

if TYPE_CHECKING:
    from transformers import ChameleonConfig

MODEL_TYPE = "chameleon"
CHAMELEON, LUMINA = "ChameleonForConditionalGeneration", "ChameleonXLLMXForConditionalGeneration"

#: What may follow a token: text; or, in a picture, a code, the end of its row, the end of the
#: picture, or its height or width.
TEXT, CODE, LINE, END, SIZE = range(5)

#: A height or width of Lumina-mGPT counts in pairs of codes, of 32 pixels. The usual one is 768
#: pixels, the largest the 2048 of its widest pictures.
PAIR, USUAL, LARGEST = 2, 24, 64
#: Deeper than any draft.
_FAR = 1 << 20


class Known(NamedTuple):
    """What was read of a text that has only grown since."""

    length: int
    """Tokens that were read."""
    begin: int
    """Where the picture begins that the last of them is in, -1: in none."""


NOTHING_KNOWN = Known(0, -1)


@dataclass(frozen=True, eq=False)
class Layout:
    """Token ids of a model, and what they may follow each other as. All of it is NumPy, on the
    host."""

    vocab_size: int
    codes: np.ndarray = field(repr=False)
    """int64 [codes] token of each code."""
    opening: int
    """The token that every text begins with."""
    turn: int
    """The token behind what a user says."""
    begin: int
    end: int
    side: int
    """Rows and columns of codes, where pictures have one size."""
    line: int | None = None
    """The token behind each row; None: there is none, and no size either."""
    size: int | None = None
    """A height or width of n has token ``size + n``."""

    @property
    def header(self) -> int:
        """Tokens between begin and the first code."""
        return 0 if self.size is None else 2

    @property
    def bare_begins_before(self) -> bool:
        """Does the text without a prompt have the opening token before the begin token?"""
        return self.size is None

    @classmethod
    def of(cls, config: ChameleonConfig) -> Layout:
        """ValueError with one sentence if the config does not say the ids."""
        names = config.vocabulary_map or {}
        codes = {_code(name): token for name, token in names.items() if name.startswith("IMGIMG")}
        count = config.vq_config.num_embeddings
        if sorted(codes) != list(range(count)):
            raise ValueError(
                f"vocabulary_map in the model's config.json must name {count} codes of pictures "
                f"(IMGIMGAZ, IMGIMGBZ, ...), and names {len(codes)}"
            )

        def token(name: str) -> int:
            if name not in names:
                raise ValueError(f"vocabulary_map in the model's config.json has no {name!r}")
            return names[name]

        sized = LUMINA in (config.architectures or ())
        return cls(
            vocab_size=config.vocab_size,
            codes=np.array([codes[i] for i in range(count)], np.int64),
            opening=token("<s>"),
            turn=token("<reserved08706>"),
            begin=token("<racm3:break>"),
            end=token("<eoss>"),
            side=config.vq_config.resolution // pixels_of_code(config),
            line=token("<reserved08799>") if sized else None,
            size=token("<reserved08800>") if sized else None,
        )

    def forbidden(self) -> np.ndarray:
        """bool [5, vocabulary]: which tokens do not follow, by TEXT, CODE, LINE, END and SIZE."""
        out = np.ones((5, self.vocab_size), bool)
        out[TEXT] = False
        out[TEXT, self.codes] = True
        out[CODE, self.codes] = False
        out[END, self.end] = False
        if self.size is not None:
            out[LINE, self.line] = False
            out[SIZE, self.size + 1 : self.size + LARGEST + 1] = False
        return out

    def by_token(self, vectors: torch.Tensor) -> torch.Tensor:
        """A codebook float [codes, d] by token, float32 [last code's token + 1, d]: what is no code
        is far from all others, since nothing is interchangeable with it."""
        apart = 1e6 * torch.arange(1, int(self.codes.max()) + 2, dtype=torch.float32)
        out = apart[:, None].repeat(1, vectors.shape[1])
        out[torch.from_numpy(self.codes)] = vectors.float().cpu()
        return out

    def begins(self, text: np.ndarray, known: Known = NOTHING_KNOWN) -> np.ndarray:
        """int64 [n - known.length] of the tokens of a text int32 [n] that are not known: where the
        picture begins that each is in, -1 if it is in none. Its begin token is in it, its end
        token is not."""
        tokens, position = text[known.length :], np.arange(known.length, len(text))
        begun = np.maximum.accumulate(np.where(tokens == self.begin, position, known.begin))
        ended = np.maximum.accumulate(np.where(tokens == self.end, position, -1))
        return np.where(begun > ended, begun, -1)

    def read(self, text: np.ndarray, first: int, depths: np.ndarray, known: Known = NOTHING_KNOWN):
        """Of a text int32 [n] and drafts that begin or end no picture, ``depths`` int32 [m] below
        its last token. At most ``first`` tokens are ``known``.

        Returns ``begins`` int64 and ``follows`` (TEXT, CODE, ...) int64, each [n - first + m]: of
        the tokens from ``first`` on, then of the drafted ones; and what is known now.
        """
        begins = self.begins(text, known)
        known, begins = Known(len(text), int(begins[-1])), begins[first - known.length :]
        begins = np.concatenate((begins, np.full(len(depths), known.begin)))
        positions = np.concatenate((np.arange(first, len(text)), len(text) - 1 + depths))
        follows = np.full(len(begins), TEXT, np.int64)
        for begin in np.unique(begins[begins >= 0]):
            inside = begins == begin
            follows[inside] = self._follows(positions[inside] - begin, *self._shape(text[begin:]))
        return begins, follows, known

    def _shape(self, picture: np.ndarray) -> tuple[int, int]:
        """Rows and columns of codes of a picture, its begin token first; none if its size is not
        known, or not one that the model could have generated."""
        if self.size is None:
            return self.side, self.side
        sizes = picture[1:3].astype(np.int64) - self.size
        if len(sizes) < 2 or (sizes < 1).any() or (sizes > LARGEST).any():
            return 0, 0
        return PAIR * int(sizes[0]), PAIR * int(sizes[1])

    def length(self, rows: int, columns: int) -> int:
        """Tokens of the rows of a picture of so many codes."""
        return rows * (columns + (self.line is not None))

    def _follows(self, positions: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """What follows the tokens at ``positions`` int64 [n] of a picture, its begin token's being
        0."""
        index = positions - self.header
        follows = np.full(len(positions), CODE, np.int64)
        if self.line is not None:
            follows[index % (columns + 1) == columns] = LINE
        follows[index >= self.length(rows, columns)] = END
        follows[index < 0] = SIZE
        return follows

    def kept(
        self, text: np.ndarray, draft: np.ndarray, depths: np.ndarray, known: Known = NOTHING_KNOWN
    ) -> int:
        """How many of the tokens ``draft`` int [m], ``depths`` int32 [m] below the text's last, may
        be verified: as far as none begins a picture or leaves one, so that :meth:`read` holds.
        Fewer tokens than the text has are ``known``."""
        wrong = (draft == self.begin) | (draft == self.end) | (depths > self._room(text, known))
        return int(wrong.argmax()) if wrong.any() else len(draft)

    def _room(self, text: np.ndarray, known: Known) -> int:
        """Tokens left of the picture at a text's end; none before its size is known."""
        begin = self.begins(text, known)[-1]
        if begin < 0:
            return _FAR
        index = len(text) - 1 - begin - self.header
        if index < 0:
            return 0
        return max(self.length(*self._shape(text[begin:])) - index, 0)

    def grid(self, tokens: np.ndarray) -> np.ndarray:
        """Codes int64 [rows, columns] of a picture, from the tokens of its rows."""
        columns = self.side
        if self.line is not None:
            columns = int(np.flatnonzero(tokens == self.line)[0])
        rows = tokens.reshape(-1, columns + (self.line is not None))[:, :columns]
        code = np.full(self.vocab_size, -1)
        code[self.codes] = np.arange(len(self.codes))
        return code[rows]


def complete(config: ChameleonConfig) -> None:
    """Add what the files of the public models do not say, as their own code has it."""
    if not hasattr(config, "guidance_scale"):
        config.guidance_scale = 4.0 if LUMINA in (config.architectures or ()) else 3.0
    config.codebook_size = config.vq_config.num_embeddings
    Layout.of(config)


def _code(name: str) -> int:
    """Of a token's name: IMGIMGBFAZ is code 150."""
    return int("".join(str(ord(letter) - ord("A")) for letter in name[len("IMGIMG") : -1]))


def pixels_of_code(config: ChameleonConfig) -> int:
    """Of its side."""
    return 2 ** (len(config.vq_config.channel_multiplier) - 1)


class CodeDecoder(nn.Module):
    """The half of Chameleon's VQ model (a VQGAN, arXiv 2012.09841) that makes pictures."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)
        self.decoder = Decoder(config, attention=False)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [B, channels, height, width] in about [-1, 1] of codes int64
        [B, rows, columns]."""
        return self.decoder(self.post_quant_conv(self.codebook(codes).movedim(-1, 1)))


def load_decoder(config: ChameleonConfig, folder: str | Path) -> CodeDecoder:
    """From ``vqgan.ckpt``, the public file of the VQ model, or from ``model.vqmodel.*`` of the
    checkpoint, in a model's folder. ValueError with one sentence if neither has a decoder."""
    vq, folder = config.vq_config, Path(folder)
    if (folder / "vqgan.ckpt").exists():
        tensors = read(folder / "vqgan.ckpt")
    else:
        prefix = "model.vqmodel."
        tensors = {
            name.removeprefix(prefix): tensor
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in weights.beginning(file, prefix).items()
        }
    if "decoder.conv_out.weight" not in tensors:
        raise ValueError(
            f"{folder} has nothing that decodes pictures: put Chameleon's vqgan.ckpt there (many "
            f"checkpoints have only the encoder)"
        )
    sizes = VQConfig(
        codebook_size=vq.num_embeddings, codebook_dim=vq.embed_dim, image_channels=vq.in_channels,
        channels=vq.base_channels, multipliers=tuple(vq.channel_multiplier),
        blocks=vq.num_res_blocks, latent_channels=vq.latent_channels,
    )  # fmt: skip
    given = taming_tensors(tensors, len(sizes.multipliers))
    given["codebook.weight"] = tensors["quantize.embedding.weight"]
    model = CodeDecoder(sizes)
    model.load_state_dict({name: tensor.float() for name, tensor in given.items()})
    return model.eval()
