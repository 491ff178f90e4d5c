"""Configs of the test-only drafting methods, registered on import.

Apart from ``drafters.py`` because vLLM's CPU platform fails to start once numba is
loaded (it scans the attributes of all modules): proposers are imported later.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from vllm_specplus.config import METHODS, MethodConfig
from vllm_specplus.control.settings import ControlConfig, FixedControl
from vllm_specplus.proposers import REGISTRY


class Everything(MethodConfig):
    """Verifies all that is drafted, unless a test wants the controller."""

    control: ControlConfig = FixedControl(policy="fixed")

    @model_validator(mode="after")
    def _fixed_says_how_many(self):
        return self


class HiddenTruthConfig(Everything):
    method: Literal["hidden_truth"] = "hidden_truth"
    num_speculative_tokens: int = 8
    reference: str
    """JSON file: list of [prompt ids, output ids] of plain decoding."""
    shape: Literal["tree", "chain", "random"] = "tree"
    seed: int = 0


class SwitchingConfig(Everything):
    method: Literal["switching"] = "switching"
    num_speculative_tokens: int = 8
    reference: str
    record: str
    """File to write: [[tokens known, nodes verified in the step before], ...]."""
    wrong: list[int]
    """Output positions between which all drafts are wrong."""


class BrokenConfig(Everything):
    method: Literal["broken"] = "broken"
    num_speculative_tokens: int = 4


METHODS["hidden_truth"] = HiddenTruthConfig
METHODS["switching"] = SwitchingConfig
METHODS["broken"] = BrokenConfig
REGISTRY["hidden_truth"] = "tests.engine.drafters:HiddenTruth"
REGISTRY["switching"] = "tests.engine.drafters:Switching"
REGISTRY["broken"] = "tests.engine.drafters:Broken"
