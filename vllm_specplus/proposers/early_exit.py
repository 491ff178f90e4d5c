"""Early exit: the target drafts with its first layers, and its own output layer.

LayerSkip's self-speculation (arXiv 2404.16710) with the choice of the exit by DEL (arXiv
2504.05598). Made for models that were trained to be left early: the first half of others
predicts next to nothing.

DEL reads every layer's hidden states from the verification. vLLM compiles that pass as a
whole, so here the exits are compared by replaying a few recent tokens through the first
layers, every eighth round. How many tokens to draft is the controller's business.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from vllm_specplus.drafting.self_speculation import ExitChoice, Skips
from vllm_specplus.proposers.layer_skip import SelfSpeculation, SelfSpeculationConfig
from vllm_specplus.registry import register_method
from vllm_specplus.strict import quoted


class EarlyExitConfig(SelfSpeculationConfig):
    """``{"method": "early_exit", ...}``."""

    lowest: ClassVar[int] = 1  # they count layers

    method: Literal["early_exit"] = "early_exit"
    exit_layers: list[Annotated[int, Field(ge=1, le=10_000)]] | None = Field(
        default=None, min_length=1
    )
    """How many layers may run, in ascending order: the best is found while serving. By default
    a quarter, a half and three quarters of them."""

    @model_validator(mode="after")
    def _exits_ascend(self):
        if self.exit_layers and self.exit_layers != sorted(set(self.exit_layers)):
            raise ValueError(
                f"'exit_layers' is {quoted(self.exit_layers)}: name each once, ascending"
            )
        return self

    def named_layers(self) -> dict[str, list[int] | None]:
        return {"exit_layers": self.exit_layers}


@register_method
class EarlyExit(SelfSpeculation):
    config_class = EarlyExitConfig
    _choice: ExitChoice

    def first_choice(self, num_layers: int) -> Skips:
        quarters = sorted({max(1, num_layers * i // 4) for i in (1, 2, 3)})
        exits = self.config.exit_layers or quarters
        self._choice = ExitChoice(exits, num_layers, len(self.levels))
        return Skips.above(exits[len(exits) // 2], num_layers)

    def choose(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> Skips:
        choice = self._choice
        if len(choice.exits) > 1:
            choice.observe(*self._executor.replay(names, texts, starts, Skips(), choice.exits))
            return Skips.above(choice.best, self._executor.model.num_layers)
        return self._executor.skips
