"""Keys of methods whose draft may run while the target verifies (``overlap/``)."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from pydantic import field_validator, model_validator

from vllm_specplus.drafting.shaped_config import ShapedDraftConfig
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target


def cores_of(text: str) -> set[int]:
    """The cores that ``text`` names, as ``2-3,6``; ValueError if it names none so."""
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit()):
            raise ValueError(f"{quoted(text)} names no cores: write for example '4-7' or '2,3'")
        if not int(first) <= int(last) < 1 << 16:
            raise ValueError(f"{quoted(text)} has a range of cores that does not ascend")
        cores |= set(range(int(first), int(last) + 1))
    return cores


class OverlapConfig(ShapedDraftConfig):
    """Drafting while the target verifies: PEARL (arXiv 2408.11850), extended to trees."""

    overlap: Literal[False, True, "paper"] = False
    """Does the draft go on, on devices of its own, while the target verifies? ``"paper"``: as PEARL
    does it, below one outcome, and without ever waiting for a draft that was not foreseen."""
    draft_cores: str | None = None
    """On a CPU, the cores that such a draft runs on, as ``"4-7"``; the engine runs on others."""

    @field_validator("draft_cores")
    @classmethod
    def _cores_are_named(cls, cores: str | None) -> str | None:
        if cores is not None:
            try:
                cores_of(cores)
            except ValueError as error:
                raise ValueError(f"'draft_cores': {error}") from None
        return cores

    @model_validator(mode="after")
    def _overlap_fits(self):
        if not self.overlap:
            if self.draft_cores is not None:
                raise ValueError(
                    "'draft_cores' is for 'overlap': set it to true, or remove the key"
                )
            return self
        if getattr(self, "share_target", False):
            raise ValueError(
                "'share_target' has the draft on the target's devices, which are busy while the "
                "target verifies: remove it, or 'overlap'"
            )
        if getattr(self, "vocabulary", "same") != "same":
            raise ValueError(
                "'overlap' has the draft in a process that knows no tokenizer but its own: remove "
                "it, or 'vocabulary'"
            )
        return self

    def check_overlap(self, target: Target) -> None:
        """Raise ValueError if drafting and verifying would share a device."""
        if not self.overlap:
            return
        if target.device_type != "cpu":
            if self.draft_cores is not None:
                raise ValueError(
                    f"'draft_cores' is for engines on a CPU, and this one runs on "
                    f"{target.device_type!r}: remove it; Ray finds a device for the draft"
                )
            if importlib.util.find_spec("ray") is None:
                raise ValueError(
                    "'overlap' has Ray find a device of its own for the draft: pip install "
                    "'vllm-specplus[ray]'"
                )
            return
        engine = os.sched_getaffinity(0)
        if self.draft_cores is None:
            raise ValueError(
                "'overlap' needs cores that the engine does not run on, or drafting and verifying "
                "would take turns: start the engine on some (taskset -c 0-3 vllm serve ...) and "
                "name others in 'draft_cores' ('4-7')"
            )
        if common := sorted(cores_of(self.draft_cores) & engine):
            raise ValueError(
                f"'draft_cores' {quoted(self.draft_cores)} and the engine share cores "
                f"({', '.join(map(str, common[:8]))}), on which drafting and verifying would take "
                f"turns: start the engine on others, as with taskset -c"
            )
        if (last := max(cores_of(self.draft_cores))) >= (os.cpu_count() or 1):
            raise ValueError(
                f"'draft_cores' {quoted(self.draft_cores)} names core {last}, and this machine has "
                f"{os.cpu_count()}, counted from 0"
            )

    def check_source(self) -> None:
        super().check_source()
        if self.overlap:
            raise ValueError(
                f"'sources': {self.method!r} cannot be one with 'overlap', since what is fused is "
                f"drafted after the step: remove it"
            )
