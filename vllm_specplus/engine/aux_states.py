"""States of the target between and behind its layers, for those who read them.

vLLM hands them out for EAGLE-3's heads, counted as what *enters* a layer; behind the last layer,
before the final norm, is one more. A proposer may ask for some of them, and a judge for that last
one: this divides among both what the one list of vLLM's models holds.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)


class AuxiliaryStates:
    """Which states are handed out, and to whom."""

    def __init__(self, proposer: tuple[int, ...] | None, before_norm: bool, num_layers: int):
        """``proposer``: layers that it asks for, () for the model's own choice, None for none;
        ``before_norm``: does a judge read what leaves the last of ``num_layers``?"""
        self._proposer, self._last = proposer, num_layers
        self.judged = before_norm
        """Does a judge read them?"""
        self._warned = False

    @classmethod
    def of(cls, drafter: Any, model_config: Any) -> AuxiliaryStates:
        """What our ``drafter`` and its acceptance rule ask of a model of vLLM's
        ``model_config``."""
        return cls(
            drafter.proposer.hidden_layers, drafter.config.acceptance.reads_before_norm,
            model_config.get_total_num_hidden_layers(),
        )  # fmt: skip

    @property
    def wanted(self) -> bool:
        """Is anything asked for?"""
        return self._proposer is not None or self.judged

    def layers(self, model: Any) -> tuple[int, ...] | None:
        """What vLLM's ``model`` is to hand out; None: as it likes."""
        asked = self._proposer
        if not self.judged:
            return asked or None
        if asked == ():
            asked = tuple(model.get_eagle3_default_aux_hidden_state_layers())
        self._proposer = asked
        return tuple(sorted({*(asked or ()), self._last}))

    def for_proposer(self, states: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
        """Those of the states [n, hidden] that the proposer has asked for."""
        if not self.judged or states is None:
            return states
        if self._proposer is None:
            return None
        return states[: len(self._proposer)]  # they come in the order of layers

    def of_rows(self, state: Any, size: int) -> torch.Tensor | None:
        """States [L, size] of the verified rows of vLLM's ``ExecuteModelState``, as a judge reads
        them; None: there are none."""
        if self.judged:
            rows = state.spec_decode_metadata.logits_indices
            return self.before_norm(state.aux_hidden_states, rows)
        # Image models may have more than the hidden units in a row.
        return state.sample_hidden_states[:, :size]

    def before_norm(
        self, states: list[torch.Tensor] | None, rows: torch.Tensor
    ) -> torch.Tensor | None:
        """What leaves the last layer at batch rows ``rows`` int64 [L]: [L, hidden]; None, with a
        warning, of a model that does not hand it out."""
        count = len({*(self._proposer or ()), self._last})
        if states is None or len(states) != count:
            if not self._warned:
                log.warning(
                    "vLLM's model does not hand out the states before its last norm: the judge "
                    "accepts nothing, train its head with --set states=after_norm"
                )
                self._warned = True
            return None
        return states[-1][rows]
