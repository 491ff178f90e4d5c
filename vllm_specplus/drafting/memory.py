"""Is a draft the same on all nodes, and does it fit there? Both are asked before it is loaded."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch

from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import tensor_shapes
from vllm_specplus.strict import quoted


def fingerprint(folder: str) -> str:
    """Names the draft by its config and by names, shapes and sizes of its weights; reads none."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for file in sorted(Path(folder).glob("*.safetensors")):
        shapes = sorted(tensor_shapes(file, file.name).items())
        digest.update(f"{file.name} {file.stat().st_size} {shapes}".encode())
    return digest.hexdigest()[:16]


def check_same(folder: str, expected: str, node: str) -> None:
    """Raise DraftModelError unless the draft on this ``node`` is the one whose :func:`fingerprint`
    is ``expected``."""
    try:
        found = fingerprint(folder)
    except (OSError, ValueError) as error:
        raise DraftModelError(
            f"draft model {quoted(folder)} cannot be read on node {node} ({error}): put it "
            f"there, in the same folder as on the engine's node"
        ) from None
    if found != expected:
        raise DraftModelError(
            f"draft model {quoted(folder)} is another one on node {node} than on the engine's: "
            f"copy the same model to both"
        )


def check_fits(folder: str, dtype: torch.dtype, device: torch.device, key_bytes: int) -> None:
    """Raise DraftModelError unless ``device`` has memory for the whole draft, which is loaded
    before it is divided, and for ``key_bytes`` of keys and values."""
    numbers = sum(
        math.prod(shape)
        for file in Path(folder).glob("*.safetensors")
        for shape in tensor_shapes(file, file.name).values()
    )
    needed, free = numbers * dtype.itemsize + key_bytes, _free(device)
    if needed > free:
        raise DraftModelError(
            f"draft model {quoted(folder)} takes {needed / 1e9:.1f} GB with its keys and values, "
            f"and {device} has {free / 1e9:.1f} GB left: use a smaller draft, lower 'kv_memory_mb' "
            f"or leave it more memory"
        )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    import psutil

    return int(psutil.virtual_memory().available)
