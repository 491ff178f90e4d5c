"""Trees from the module for multi-token prediction (MTP) that a target was trained with.

vLLM's own ``mtp`` drafts chains. The same module gives trees here as an EAGLE head does, in all the
shapes of ``draft_tree``: it goes on from the target's hidden states, level by level, with keys and
values of its own beside the target's (``drafting/head_executor.py``).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.drafting import mtp_checkpoint
from vllm_specplus.drafting.eagle import Vocabulary
from vllm_specplus.drafting.head_target import check_fits
from vllm_specplus.drafting.hub import model_folder
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.mtp import MtpHead
from vllm_specplus.drafting.shaped_config import ShapedDraftConfig
from vllm_specplus.proposers.eagle_tree import EagleTree
from vllm_specplus.registry import register_method
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target


class MtpTreeConfig(ShapedDraftConfig):
    """``{"method": "mtp_tree", "model": "...", ...}``."""

    supports: ClassVar[frozenset[Need]] = TEXT - {
        Need.ADAPTED_LAYERS,
        Need.KV_GROUPS,
        Need.MROPE,
    }

    method: Literal["mtp_tree"] = "mtp_tree"
    model: str
    """Folder of the target whose checkpoint has the module, or of the module alone with the
    target's config; or its name on the Hugging Face hub."""

    @property
    def folder(self) -> str:
        """Where the module is on this machine."""
        return model_folder(self.model, "MTP module")

    @model_validator(mode="after")
    def _module_runs(self):
        mtp_checkpoint.read_config(self.folder)
        return self

    def check_target(self, target: Target) -> None:
        target.check_keeps_texts(self.method)
        module = mtp_checkpoint.read_config(self.folder)
        name = f"MTP module {quoted(self.model)}"
        check_fits(target, name, module.hidden_size, module.vocab_size, None)
        if module.target_layers != target.num_layers:
            raise DraftModelError(
                f"{name} was trained with a target of {module.target_layers} layers, and this one "
                f"has {target.num_layers}"
            )


@register_method
class MtpTree(EagleTree):
    config_class = MtpTreeConfig  # type: ignore[assignment]
    config: MtpTreeConfig  # type: ignore[assignment]

    def _reads(self) -> tuple[int, ...] | None:
        return None

    def _load_head(self, target: Vocabulary, device: torch.device, dtype: torch.dtype) -> MtpHead:
        return MtpHead(self.config.folder, target, device, dtype)
