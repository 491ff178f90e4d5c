"""What a user may set under ``control``: by which policy it is decided how much to draft."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vllm_specplus.control.cost import CostProfile
from vllm_specplus.files import check_writable, is_file
from vllm_specplus.strict import StrictModel


class GoodputControl(StrictModel):
    """As many nodes as make the most expected tokens per second, every step."""

    policy: Literal["goodput"] = "goodput"
    cost_file: str | None = None
    """Step times: read from this file if it exists, else measured at start and written."""

    @model_validator(mode="after")
    def _file_can_be_used(self):
        if self.cost_file is not None:
            check_writable(self.cost_file, "cost_file")
            if is_file(self.cost_file):
                CostProfile.read(self.cost_file)
        return self


class FixedControl(StrictModel):
    """Always ``num_speculative_tokens`` nodes, or as many as the method finds."""

    policy: Literal["fixed"]


class ThresholdControl(StrictModel):
    """Nodes whose path holds a rejection with less than this probability (SpecDec++)."""

    policy: Literal["threshold"]
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7


ControlConfig = GoodputControl | FixedControl | ThresholdControl
