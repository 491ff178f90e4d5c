"""Counters of the drafting engine.

The worker that drafts counts; who reads adds up what was counted since it last looked. How that
comes to vLLM's ``/metrics`` is ``engine/counts.py``.
"""

from __future__ import annotations

import numpy as np

#: Classes of relative errors of predicted step times, by their upper ends in percent.
STEP_ERRORS = (5, 10, 20, 50)
#: name -> help. A name "family:label" is one value of a labelled counter.
COUNTERS = {
    "request_steps": "Decoding steps, counted once per request in the step.",
    "output_tokens": "Tokens that came out of these steps.",
    "nodes_drafted": "Draft nodes verified by the target model.",
    "nodes_accepted": "Draft nodes that became text.",
    "relaxed_tokens": "Of these, nodes that a lossy rule took in place of the draw.",
    "residuals_given_up": "Rejected latents that the bound on proposals replaced by the target's.",
    "kv_slots_moved": "Cache slots copied to compact an accepted path.",
    "draft_seconds": "Seconds spent learning from the step and drafting.",
    "control_seconds": "Seconds spent deciding how much to draft.",
    "verify_seconds": "Seconds spent sampling at every row and following the tree.",
    "compact_seconds": "Seconds spent moving accepted KV slots.",
    "chain_fallbacks:structured_output": "Requests drafted as a chain instead of a tree.",
    "chain_fallbacks:resumed": "Requests drafted as a chain instead of a tree.",
    "control_steps": "Steps in which the controller decided what to verify.",
    "undrafted_steps": "Of these, steps that verified nothing.",
    "probe_steps": "Of these, steps speculated only to see whether it pays again.",
    "unwatched_steps": "Steps passed over: drafts do not pay, and looking costs time.",
    "nodes_grown": "Draft nodes the controller chose from.",
    "nodes_labelled": "Draft nodes the text proved right or wrong.",
    "expected_tokens": "Draft tokens the controller expected to be accepted.",
    "timed_steps": "Steps without prompts whose duration was predicted and measured.",
    "predicted_step_seconds": "Seconds the cost model predicted for these steps.",
    "measured_step_seconds": "Seconds these steps took.",
    **{
        f"step_errors:{name}": "These steps by how far the prediction was off, relative."
        for name in (*(f"{most}%" for most in STEP_ERRORS), "more")
    },
    "shadow_request_steps": "Decoding steps in shadow mode whose drafts were compared.",
    "shadow_tokens": "Tokens that would have come out of these, had the drafts been verified.",
    "shadow_seconds": "Seconds that these steps would have taken, by the cost model.",
    "shadow_plain_seconds": "Seconds that they take undrafted, by the cost model.",
    "limited_steps": "Steps that verified less than would pay, for the sake of a slow request.",
    "requests_above_target": "Requests that took longer per token than their target.",
    "memory_guard_trims": "Drafts shortened because cache blocks or token budget ran short.",
    "draft_group_rebuilds": "Times the processes of a layer-parallel draft were started anew.",
    "outcomes_foreseen": "Requests whose trees were drafted during the step before.",
    "late_drafts": "Steps whose drafts were not there when waiting for them ended.",
    "draft_layer_changes": "Times self-speculation chose other layers of the target.",
    "draft_layer_searches": "Times a search for these layers began anew, since acceptance fell.",
    "early_exits": "Passes of the target that spec_ee ended before its last layer.",
    "texts_beyond_head": "Requests left undrafted in a step, since the draft has fewer positions.",
    "rested_sources": "Times a source of rasd was not asked, since it took more than it brought.",
    "draft_failures": "Steps whose drafting failed; they went on undrafted.",
}
_NAMES = list(COUNTERS)
_INDEX = {name: i for i, name in enumerate(COUNTERS)}


class Counters:
    """Float64 sums by name; adding to one is a store."""

    def __init__(self):
        self.values = np.zeros(len(COUNTERS))

    def add(self, name: str, amount: float = 1.0) -> None:
        self.values[_INDEX[name]] += amount

    def __getitem__(self, name: str) -> float:
        return float(self.values[_INDEX[name]])

    def as_dict(self) -> dict[str, float]:
        return dict(zip(COUNTERS, self.values.tolist(), strict=False))


class Increments:
    """What counters grew by since they were last read, as whole billionths by name: their way to
    the front end takes whole numbers, and seconds are counted too."""

    UNIT = 1e-9

    def __init__(self):
        self._read = np.zeros(len(COUNTERS))

    def read(self, values: np.ndarray) -> dict[str, int]:
        """``values`` is `Counters.values` (float64, [counters]) or a sum of several."""
        grown = np.rint((values - self._read) / self.UNIT).astype(np.int64)
        self._read = values.copy()
        return {_NAMES[i]: int(grown[i]) for i in np.flatnonzero(grown)}
