"""Datastores for tests, made of numbers: the word "17" is token 17."""

from __future__ import annotations

from pathlib import Path

from vllm_specplus.retrieval.build import build
from vllm_specplus.retrieval.corpus import Corpus


class NumberTokenizer:
    """As much of a Hugging Face tokenizer as a build needs."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(min(self.vocab_size, 1000))} | {"size": self.vocab_size}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split() if word.isascii() and word.isdigit()]

    def __call__(self, texts: list[str], **kwargs) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}


def write_corpus(folder: Path, documents: list[list[int]], name: str = "doc") -> Path:
    """One text file per document."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, document in enumerate(documents):
        (folder / f"{name}{i:05}.txt").write_text(" ".join(map(str, document)))
    return folder


def build_datastore(
    folder: Path, documents: list[list[int]], vocab_size: int, shard_tokens: int = 1 << 24
) -> Path:
    """A datastore of ``documents`` in ``folder``."""
    corpus = Corpus.find([write_corpus(folder.parent / f"{folder.name}-text", documents)], "*", "")
    build(folder, corpus, NumberTokenizer(vocab_size), "numbers", vocab_size, shard_tokens)
    return folder
