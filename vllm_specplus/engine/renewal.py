"""Lets one engine serve measurement after measurement, each as if it had just started."""

from __future__ import annotations

from typing import Any

from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.spec_decode.ngram_proposer import NgramProposer
from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

from vllm_specplus.engine.drafter import Drafter


class Renewal:
    """A ``worker_extension_cls``: vLLM makes its methods those of the worker."""

    model_runner: Any

    def renew_drafts(self) -> bool:
        """Forgets what drafts were made of, all that a method has learnt; False where it is not
        known how. Not what the KV cache holds, which vLLM's ``reset_prefix_cache`` is for."""
        drafter = getattr(self.model_runner, "drafter", None)
        if isinstance(drafter, Drafter):
            drafter.renew()
            return True
        if isinstance(drafter, SuffixDecodingProposer):
            cache = drafter.suffix_cache
            drafter.suffix_cache = type(cache)(
                max_tree_depth=cache.max_tree_depth, max_cached_requests=cache.max_cached_requests
            )
            return True
        # These look at the text and the KV cache alone.
        return drafter is None or isinstance(drafter, NgramProposer | SpecDecodeBaseProposer)
