"""Lets one engine draft with one set of layers after another, for ``search-skips``."""

from __future__ import annotations

from typing import Any

from vllm_specplus.drafting.skip_search import Skips
from vllm_specplus.engine.drafter import Drafter
from vllm_specplus.proposers.layer_skip import LayerSkip


class SkipTrialsExtension:
    """A ``worker_extension_cls``: vLLM makes its methods those of the worker."""

    model_runner: Any

    def leave_out(self, attention: list[int], mlp: list[int]) -> bool:
        """From now on drafts run without these blocks, and nothing is searched; False: the method
        is not layer_skip."""
        drafter = getattr(self.model_runner, "drafter", None)
        if not isinstance(drafter, Drafter) or not isinstance(drafter.proposer, LayerSkip):
            return False
        drafter.proposer.leave_out(Skips(frozenset(attention), frozenset(mlp)))
        return True
