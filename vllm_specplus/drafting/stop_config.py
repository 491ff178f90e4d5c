"""When a draft that is a chain ends: what a user may write under ``stop``.

The controller decides before drafting how many levels a request may have; a stop ends the draft
earlier, by what the draft itself has computed on the way. The rules are in ``stopping.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vllm_specplus.drafting.acceptance_head import head_size
from vllm_specplus.strict import StrictModel

Probability = Annotated[float, Field(ge=0, le=1)]


class NoStop(StrictModel):
    """Behind the levels that were planned."""

    rule: Literal["none"] = "none"


class ConfidenceStop(StrictModel):
    """Behind a token that the draft gave too little (SWIFT, arXiv 2410.06916)."""

    rule: Literal["confidence"]
    threshold: Probability = 0.8


class AdaptiveConfidenceStop(StrictModel):
    """The same, by a threshold that follows the acceptance (Draft & Verify, arXiv 2309.08168)."""

    rule: Literal["adaptive_confidence"]
    threshold: Probability = 0.8
    """At first, for each request; the paper has 0.8 for greedy drafts and 0.5 for drawn ones."""
    acceptance: Probability = 0.9
    """Of drafted tokens, which is aimed at."""
    step: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """By which the threshold is moved after a round, before it is averaged with what it was."""


class TauStop(StrictModel):
    """Behind a token less sure than the middle between what right and wrong ones of the exit have
    been lately (DEL, arXiv 2504.05598)."""

    rule: Literal["tau"]


class AcceptanceHeadStop(StrictModel):
    """When a trained head expects some token of the draft to be rejected (SpecDec++, arXiv
    2405.19715)."""

    rule: Literal["acceptance_head"]
    head: str
    """File of the head, written by ``vllm-specplus train acceptance_head``."""
    threshold: Probability = 0.7
    """Probability of a rejection above which the draft ends."""

    @model_validator(mode="after")
    def _head_opens(self):
        head_size(self.head)
        return self


StopConfig = NoStop | ConfidenceStop | AdaptiveConfidenceStop | TauStop | AcceptanceHeadStop
