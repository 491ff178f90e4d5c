"""Configs of the test-only drafting methods, registered on import.

Apart from ``drafters.py`` because vLLM's CPU platform fails to start once numba is
loaded (it scans the attributes of all modules): proposers are imported later.
"""

from __future__ import annotations

from typing import Literal

from vllm_specplus.config import METHODS, MethodConfig
from vllm_specplus.proposers import REGISTRY


class HiddenTruthConfig(MethodConfig):
    method: Literal["hidden_truth"] = "hidden_truth"
    num_speculative_tokens: int = 8
    reference: str
    """JSON file: list of [prompt ids, output ids] of plain decoding."""
    shape: Literal["tree", "chain", "random"] = "tree"
    seed: int = 0


class BrokenConfig(MethodConfig):
    method: Literal["broken"] = "broken"
    num_speculative_tokens: int = 4


METHODS["hidden_truth"] = HiddenTruthConfig
METHODS["broken"] = BrokenConfig
REGISTRY["hidden_truth"] = "tests.engine.drafters:HiddenTruth"
REGISTRY["broken"] = "tests.engine.drafters:Broken"
