"""Self-speculation: the target drafts with some of its layers left out.

Draft & Verify (arXiv 2309.08168) and SWIFT (arXiv 2410.06916). The draft is the target
without some attention and MLP blocks: no second model, no training, no second tokenizer.
Weights are the target's own, keys and values of the text are copies of the target's
(``drafting/self_speculation.py``). Levels of the tree, their shape and their verification are
those of ``draft_tree``.

SWIFT searches the blocks to leave out while it serves, once per step. Here a candidate is
tried every eighth round, against the best set so far and on the same tokens, until nearly all
of them are predicted.
"""

from __future__ import annotations

import logging
from abc import abstractmethod

import numpy as np
import torch

from vllm_specplus.drafting.self_speculation import SelfDraftExecutor, Skips, SkipSearch
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.step import StepContext

logger = logging.getLogger("vllm.specplus")

#: Rounds of drafting between two replays.
REPLAY_EVERY = 8


class SelfSpeculation(DraftTree):
    """Drafts with the target's layers; a subclass decides which."""

    _executor: SelfDraftExecutor
    _rounds = 0

    def _make_model(self, device: torch.device, dtype: torch.dtype):
        return self.target_layers()

    def _make_executor(self, model, max_slots: int) -> SelfDraftExecutor:
        executor = SelfDraftExecutor(model, max_slots, max_nodes=sum(self.levels))
        executor.skips = self.first_choice(model.num_layers)
        return executor

    def _begin(self, step: StepContext, rows: np.ndarray, names: list, texts: list):
        self._executor.follow(names, texts, rows, step.target_kv)
        if self._rounds % REPLAY_EVERY == REPLAY_EVERY - 1:
            # Prompts are not what the target would have said: outputs only.
            outputs = step.num_prompt_tokens[rows] < step.num_tokens[rows] - 1
            if outputs.any():
                here = np.flatnonzero(outputs)
                self._reconsider(
                    [names[i] for i in here], [texts[i] for i in here],
                    step.num_prompt_tokens[rows[here]],
                )  # fmt: skip
        self._rounds += 1
        return super()._begin(step, rows, names, texts)

    def _reconsider(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> None:
        chosen = self.choose(names, texts, starts)
        if chosen != self._executor.skips:
            self._executor.skips = chosen
            self.count("draft_layer_changes")
            logger.debug("%s now leaves out %s", self.config.method, chosen)

    @abstractmethod
    def first_choice(self, num_layers: int) -> Skips:
        """What to leave out before anything is known."""

    @abstractmethod
    def choose(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> Skips:
        """Learn from a replay of the texts, whose outputs begin at ``starts`` int64 [R]; what
        to leave out from now on."""


class LayerSkip(SelfSpeculation):
    _search: SkipSearch | None = None

    def first_choice(self, num_layers: int) -> Skips:
        config = self.config
        if config.skip_attention is not None or config.skip_mlp is not None:
            return Skips(frozenset(config.skip_attention or ()), frozenset(config.skip_mlp or ()))
        self._search = SkipSearch(num_layers, config.skip_share)
        return Skips.of(self._search.best)

    def choose(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> Skips:
        search, replay = self._search, self._executor.replay
        if search is None or search.resting:
            return self._executor.skips
        candidate, end = search.candidate(), [self._executor.model.num_layers]
        (right,), seen = replay(names, texts, starts, Skips.of(candidate), end)
        (best_right,), _ = replay(names, texts, starts, self._executor.skips, end)
        search.judge(candidate, int(right), int(best_right), seen)
        return Skips.of(search.best)
