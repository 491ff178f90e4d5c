"""Early exit: the target drafts with its first layers, and its own output layer.

LayerSkip's self-speculation (arXiv 2404.16710) with the choice of the exit by DEL (arXiv
2504.05598). Made for models that were trained to be left early: the first half of others
predicts next to nothing.

DEL's *shadow tokens*: while the target verifies, the hidden states behind every exit are kept, and
behind the verification each says what it would have drafted at the rows that became text. By how
often it was right the exit of the next round is chosen, request by request, and by how sure it was
when it was right, and when not, where a draft stops (``drafting/exits.py``, the stop ``tau``). How
many tokens may be drafted is the controller's business.

Where vLLM hands out no hidden states of a target, a few recent tokens are replayed through the
first layers instead, every eighth round, and all requests have one exit.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.drafting.exits import ExitChoice, ExitStatistics, best_exit
from vllm_specplus.drafting.skip_search import Skips
from vllm_specplus.drafting.stopping import Stop, make_stop
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.layer_skip import SelfSpeculation, SelfSpeculationConfig
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext, TargetRows
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target


class EarlyExitConfig(SelfSpeculationConfig):
    """``{"method": "early_exit", ...}``."""

    lowest: ClassVar[int] = 1  # they count layers
    stops: ClassVar[frozenset[str]] = SelfSpeculationConfig.stops | {"tau"}

    method: Literal["early_exit"] = "early_exit"
    exit_layers: list[Annotated[int, Field(ge=1, le=10_000)]] | None = Field(
        default=None, min_length=1
    )
    """How many layers may run, in ascending order: the best is found while serving. By default
    a quarter, a half and three quarters of them."""
    statistics: Literal["verification", "replay"] | None = None
    """From where it is known what each exit would have said; None: from the verification where vLLM
    hands out the target's hidden states, else from replays."""

    @model_validator(mode="after")
    def _exits_ascend(self):
        if self.exit_layers and self.exit_layers != sorted(set(self.exit_layers)):
            raise ValueError(
                f"'exit_layers' is {quoted(self.exit_layers)}: name each once, ascending"
            )
        return self

    @model_validator(mode="after")
    def _tau_is_known(self):
        if self.stop.rule == "tau" and self.statistics == "replay":
            raise ValueError(
                "'stop' by the rule 'tau' goes by how sure the exits were in the verification: set "
                "'statistics' to 'verification', or 'stop' to another rule"
            )
        return self

    @classmethod
    def as_source(cls, keys: dict[str, Any]) -> dict[str, Any]:
        # Others may read hidden states of other layers.
        return {"statistics": "replay"} | super().as_source(keys)

    def check_target(self, target: Target) -> None:
        super().check_target(target)
        needs_states = self.statistics == "verification" or self.stop.rule == "tau"
        if needs_states and not target.gives_layers():
            raise ValueError(
                f"vLLM hands out no hidden states of a target of type {target.family!r}, by which "
                f"exits are compared: set 'statistics' to 'replay', and no 'stop' by the rule 'tau'"
            )

    @property
    def reads_layers(self) -> bool:
        return self.statistics != "replay"

    def named_layers(self) -> dict[str, list[int] | None]:
        return {"exit_layers": self.exit_layers}

    def exits(self, num_layers: int) -> list[int]:
        """The exits of a target of so many layers."""
        quarters = sorted({max(1, num_layers * i // 4) for i in (1, 2, 3)})
        return self.exit_layers or quarters


@register_method
class EarlyExit(SelfSpeculation):
    config_class = EarlyExitConfig
    config: EarlyExitConfig
    may_miss = True
    _choice: ExitChoice

    def __init__(self, config: EarlyExitConfig, services: Services):
        super().__init__(config, services)
        self._exits = config.exits(services.num_layers)
        given = config.statistics
        if given == "verification" or (given is None and services.gives_layers()):
            self.reads_hidden, self.hidden_layers = True, tuple(self._exits)
        # What is known of each request, with which a new one begins, and where each is left.
        self._all = ExitStatistics(len(self._exits))
        self._of: dict[str, ExitStatistics] = {}
        self._left: dict[str, int] = {}

    def attending(self, num_layers: int) -> list[int]:
        return list(range(max(self._exits)))

    def first_choice(self, num_layers: int) -> Skips:
        self._choice = ExitChoice(self._exits, num_layers, len(self.levels))
        return Skips.above(self._exits[len(self._exits) // 2], num_layers)

    def choose(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> Skips:
        choice = self._choice
        if len(choice.exits) > 1:
            choice.observe(*self._executor.replay(names, texts, starts, Skips(), choice.exits))
            return Skips.above(choice.best, self._executor.model.num_layers)
        return self._executor.skips

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._of.pop(request_id, None)
        self._left.pop(request_id, None)

    def _make_stop(self) -> Stop | None:
        return make_stop(self.config.stop, threshold_of=self._tau)

    def _tau(self, request: str) -> float:
        return float(self._of[request].tau[self._exits.index(self._left[request])])

    def _learn(self, step: StepContext, rows: np.ndarray, names: list, texts: list) -> None:
        if step.target_rows is None:
            super()._learn(step, rows, names, texts)
            return
        self._observe(step, step.target_rows, rows, names)
        layers, most = self._executor.model.num_layers, len(self.levels)
        for name in names:
            exit_, _ = best_exit(self._of[name].right, self._exits, layers, most)
            if self._left.get(name, exit_) != exit_:
                self.services.count("draft_layer_changes")
            self._left[name] = exit_
        self._executor.exits = np.array([self._left[name] for name in names])

    def _observe(
        self, step: StepContext, seen: TargetRows, rows: np.ndarray, names: list[str]
    ) -> None:
        """Add to the statistics of the requests ``rows`` int [A] what their exits said at the rows
        that became text, up to the one behind which a draft was wrong or ended."""
        for name in names:
            self._of.setdefault(name, self._all.copy())
        first, end = seen.starts[rows], seen.starts[rows + 1]
        here = np.concatenate([np.arange(*each) for each in zip(first, end, strict=True)])
        owner = np.repeat(np.arange(len(rows)), end - first)
        behind = seen.positions[here] + 1
        # Prompts are not what the target would have said: outputs only.
        said = behind >= step.num_prompt_tokens[rows[owner]]
        here, owner, behind = here[said], owner[said], behind[said]
        if not len(here):
            return
        device = seen.states.device
        tokens = torch.from_numpy(step.token_ids[rows[owner], behind].astype(np.int64)).to(device)
        states = seen.states[torch.from_numpy(here).to(device)].chunk(len(self._exits), -1)
        found = []
        for each in states:  # one by one: of all exits logits would be large
            sure, best = self._executor.logits(each).softmax(-1).max(-1)
            found.append(torch.stack(((best == tokens).float(), sure)))
        right, confidence = torch.stack(found, -1).cpu().numpy()  # [n, exits] each
        for number, name in enumerate(names):
            own = owner == number
            if own.any():
                for statistics in (self._of[name], self._all):
                    statistics.observe(right[own] > 0, confidence[own])
