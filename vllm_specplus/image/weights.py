"""Tensors of a model in a file: read in float32, written in half precision."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def load(model: nn.Module, file: Path) -> nn.Module:
    """``model``, ready to use, with the tensors of ``file``."""
    tensors = load_file(file)
    model.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    )
    return model.eval()


def save(model: nn.Module, file: Path, dtype: torch.dtype = torch.float16) -> None:
    """``dtype``: of all floats."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.to(dtype) if t.is_floating_point() else t).contiguous()
        for name, t in model.state_dict().items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def beginning(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so; the others are not read."""
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return {name: tensors.get_tensor(name) for name in names if name.startswith(prefix)}
