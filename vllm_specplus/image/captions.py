"""Captions as a text encoder (T5, arXiv 1910.10683) reads them.

A model of text was trained on the states of one encoder, FLAN-T5 XL for the public ones. It is a
folder of its own, ``text_encoder/``, in the model's: a T5 encoder and its tokenizer, as
transformers saves them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from pathlib import Path
from threading import Lock

import torch

FOLDER = "text_encoder"

_PLAIN = {ord(a): b for a, b in zip("‘’`´¨“”«»", "''" + '"' * 7, strict=True)}
_PLAIN |= dict.fromkeys(map(ord, "#®•©™&@·º½¾¿¡§~()[]{}|\\/*+<>"), " ")


def clean(caption: str) -> str:
    """As LlamaGen's captions were cleaned before T5 read them: lower case, plain dashes and
    quotes, no brackets and signs, no Chinese characters. What its rules say about text scraped
    off the web (addresses, file names, article numbers, phrases of shops) is left out."""
    signs = html.unescape(caption).lower().translate(_PLAIN)
    text = "".join(
        "-" if unicodedata.category(sign) == "Pd" else sign
        for sign in signs
        if not unicodedata.name(sign, "").startswith("CJK")
    )
    text = re.sub(r"[\"']{2,}", '"', text)
    text = re.sub(r"\.{2,}|\s\.(?=\s)", " ", text)
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = re.sub(r"(?<=\D)([.,])(?=\w)", r"\1 ", text)
    text = " ".join(text.split())
    text = re.sub(r"^[\"'](.+)[\"']$", r"\1", text)
    return text.strip("-',:;_ ")


class CaptionEncoder:
    """The encoder in a model's folder, loaded when the first caption comes."""

    def __init__(self, folder: str | Path, tokens: int, size: int):
        """Captions of at most ``tokens`` tokens become states of width ``size``."""
        self._folder = Path(folder) / FOLDER
        self._tokens, self._size = tokens, size
        self._lock = Lock()
        self._loaded = None

    @torch.inference_mode()
    def states(self, caption: str) -> torch.Tensor:
        """float [n, size]; ValueError with one sentence if there is no encoder, or the caption is
        too long for it."""
        if not self._folder.is_dir():
            raise ValueError(
                f"this model reads captions with a text encoder, and {self._folder} is not there: "
                f"write it with `python -m vllm_specplus.image.convert ... --text-encoder T5`"
            )
        with self._lock:  # requests come in threads
            if self._loaded is None:
                self._loaded = load(self._folder, self._size)
        tokenizer, model = self._loaded
        ids = tokenizer(clean(caption), return_tensors="pt").input_ids
        if ids.shape[1] > self._tokens:
            raise ValueError(
                f"the caption has {ids.shape[1]} tokens, and this model reads {self._tokens}: "
                f"shorten it"
            )
        return model(input_ids=ids).last_hidden_state[0]


def load(folder: Path, size: int):
    """(tokenizer, encoder) of a T5 in ``folder``; ValueError if its states are not of width
    ``size``."""
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    if model.config.d_model != size:
        raise ValueError(
            f"the text encoder in {folder} has states of width {model.config.d_model}, and this "
            f"model was trained with {size}: use the encoder it was trained with"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), model
