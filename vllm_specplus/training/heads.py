"""EAGLE heads to be trained: the modules that serving runs, with weights of their target's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.drafting.eagle_checkpoint import FAMILIES
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.steps import Chains


def check_family(target: Frozen) -> None:
    """TrainingError unless heads are served for targets like this."""
    family = target.config.model_type
    if family not in FAMILIES:
        raise TrainingError(
            f"EAGLE heads are served for targets of type {', '.join(FAMILIES)}, and this one is of "
            f"type {family!r}: train a small draft with `vllm-specplus train distill`"
        )


def load_head(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: Frozen) -> EagleHead:
    """The head that serving makes of these, in float32 beside its target, to be trained."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
        save_file(kept, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        head = EagleHead(folder, target, target.vocab_size, target.device, torch.float32)
    head.parts.requires_grad_(True)
    return head
