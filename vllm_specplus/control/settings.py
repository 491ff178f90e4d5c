"""What a user may set under ``control``: by which policy it is decided how much to draft."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from vllm_specplus.control.cost import CostProfile
from vllm_specplus.files import check_writable, is_file
from vllm_specplus.strict import StrictModel, sentences

#: Milliseconds that a user may ask for: up to an hour.
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]

Mode = Literal["on", "off", "shadow"]
Objective = Literal["latency", "throughput", "slo"]


class GoodputControl(StrictModel):
    """As many nodes as make the most expected tokens per second, every step."""

    policy: Literal["goodput"] = "goodput"
    mode: Mode = "on"
    """off: nothing is drafted; shadow: drafts are made and watched, and none is verified."""
    objective: Objective = "latency"
    """For whom a step may become longer, see ``control/objectives.py``."""
    tpot_ms: Milliseconds | None = None
    """Target of the objective "slo": a request's time per token, unless it sets its own."""
    ttft_ms: Milliseconds | None = None
    """The same of the time to the first token, as far as drafts delay it."""
    cost_file: str | None = None
    """Step times: read from this file if it exists, else measured at start and written."""

    @model_validator(mode="after")
    def _targets_are_of_an_objective(self):
        if self.objective == "slo" and self.tpot_ms is None and self.ttft_ms is None:
            raise ValueError(
                "control: the objective \"slo\" needs a target: set 'tpot_ms' or 'ttft_ms'"
            )
        for key in ("tpot_ms", "ttft_ms"):
            if getattr(self, key) is not None and self.objective != "slo":
                raise ValueError(
                    f"control: {key!r} is a target: set 'objective' to \"slo\", or remove it"
                )
        return self

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


class ControlChange(StrictModel):
    """What may be changed while serving; None: as it is."""

    mode: Mode | None = None
    objective: Objective | None = None
    tpot_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None

    def of(self, control: ControlConfig) -> GoodputControl:
        """``control`` as changed; ValueError with one sentence where that cannot be."""
        if not isinstance(control, GoodputControl):
            raise ValueError(
                f"control policy {control.policy!r} stays as it is while serving: start with the "
                f"policy 'goodput'"
            )
        keys = control.model_dump()
        if self.objective not in (None, "slo"):  # another objective has no targets
            keys |= {"tpot_ms": None, "ttft_ms": None}
        try:
            return GoodputControl.model_validate(keys | self.model_dump(exclude_none=True))
        except ValidationError as error:
            raise ValueError(sentences(error, GoodputControl)[0]) from None


ControlConfig = GoodputControl | FixedControl | ThresholdControl
