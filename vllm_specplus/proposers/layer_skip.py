"""Self-speculation: the target drafts with some of its layers left out.

Draft & Verify (arXiv 2309.08168) and SWIFT (arXiv 2410.06916). The draft is the target
without some attention and MLP blocks: no second model, no training, no second tokenizer.
Weights are the target's own, keys and values of the text are copies of the target's
(``drafting/self_speculation.py``). Levels of the tree, their shape and their verification are
those of ``draft_tree``.

SWIFT searches the blocks to leave out while it serves, once per step. Here a candidate is
tried every eighth round, against the best set so far and on the same tokens, until nearly all
of them are predicted.

Of a target on several ranks the first one decides, and all draft (``drafting/lockstep.py``).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.config import Megabytes
from vllm_specplus.drafting.lockstep import LockstepExecutor
from vllm_specplus.drafting.self_speculation import SelfDraftExecutor, Skips, SkipSearch
from vllm_specplus.drafting.shaped_config import ShapedDraftConfig
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target

logger = logging.getLogger("vllm.specplus")

#: Rounds of drafting between two replays.
REPLAY_EVERY = 8


class SelfSpeculationConfig(ShapedDraftConfig):
    """Keys of the methods that draft with the target's own layers."""

    supports: ClassVar[frozenset[Need]] = TEXT - {
        Need.ADAPTED_LAYERS,
        Need.KV_GROUPS,
        Need.MROPE,
    }
    lowest: ClassVar[int] = 0
    """Of the numbers that :meth:`named_layers` may hold."""
    kv_memory_mb: Megabytes = 512
    """The draft's own keys and values; requests beyond it go undrafted."""

    def check_target(self, target: Target) -> None:
        target.check_keeps_texts(self.method)
        if target.fp8_cache:
            raise ValueError(
                f"method {self.method!r} reads the target's keys and values as they were computed: "
                f"set --kv-cache-dtype to bfloat16, or use another method, such as "
                f"'token_recycling'"
            )
        for key, layers in self.named_layers().items():
            if layers and not self.lowest <= min(layers) <= max(layers) < target.num_layers:
                raise ValueError(
                    f"{key!r} is {quoted(layers)}, and this target allows {self.lowest} to "
                    f"{target.num_layers - 1}"
                )

    @abstractmethod
    def named_layers(self) -> dict[str, list[int] | None]:
        """Keys that name layers of the target."""


class LayerSkipConfig(SelfSpeculationConfig):
    """``{"method": "layer_skip", ...}``."""

    method: Literal["layer_skip"] = "layer_skip"
    skip_share: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of the attention and MLP blocks that drafting leaves out, first and last layer
    aside; which ones is found while serving."""
    skip_attention: list[Annotated[int, Field(ge=0, le=10_000)]] | None = None
    """Layers whose attention is left out, instead of a search."""
    skip_mlp: list[Annotated[int, Field(ge=0, le=10_000)]] | None = None
    """Layers whose MLP is left out, instead of a search."""

    @model_validator(mode="after")
    def _searched_or_given(self):
        given = [key for key, layers in self.named_layers().items() if layers is not None]
        if given and "skip_share" in self.model_fields_set:
            raise ValueError(
                f"'skip_share' is for the search, and {given[0]!r} says what to leave out: remove "
                f"one of them"
            )
        if given and not any(self.named_layers().values()):
            raise ValueError(
                "'skip_attention' and 'skip_mlp' name no layer, and a draft of all layers takes as "
                "long as the target: name some, or remove both for a search"
            )
        for key, layers in self.named_layers().items():
            if layers and len(set(layers)) < len(layers):
                raise ValueError(f"{key!r} is {quoted(layers)}: name each layer once")
        return self

    def check_target(self, target: Target) -> None:
        super().check_target(target)
        if target.num_layers < 3:
            raise ValueError(
                f"method 'layer_skip' keeps the first and the last layer, and the target has "
                f"{target.num_layers}"
            )
        if all(len(layers or ()) == target.num_layers for layers in self.named_layers().values()):
            raise ValueError(
                "'skip_attention' and 'skip_mlp' name all layers, and a draft needs some: name "
                "fewer"
            )

    def named_layers(self) -> dict[str, list[int] | None]:
        return {"skip_attention": self.skip_attention, "skip_mlp": self.skip_mlp}


class SelfSpeculation(DraftTree):
    """Drafts with the target's layers; a subclass decides which."""

    _executor: SelfDraftExecutor
    _rounds = 0

    def _make_model(self, device: torch.device, dtype: torch.dtype):
        return self.services.target_layers()

    def load_share(self, device: torch.device, dtype: torch.dtype) -> None:
        self.load_draft(device, dtype)

    def _make_executor(self, model, max_slots: int) -> SelfDraftExecutor:
        services, most = self.services, sum(self.levels)
        if services.lockstep is None:
            executor = SelfDraftExecutor(model, max_slots, most)
        else:
            executor = LockstepExecutor(model, max_slots, most, services.lockstep, services.report)
        executor.skips = self.first_choice(model.num_layers)
        return executor

    def _begin(self, step: StepContext, rows: np.ndarray, names: list, texts: list):
        self._executor.follow(names, texts, rows, step.target_kv, step.versions_of(rows))
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
            self.services.count("draft_layer_changes")
            logger.debug("%s now leaves out %s", self.config.method, chosen)

    def _is_beyond(self, length: int) -> bool:
        return False  # its positions are the target's

    @abstractmethod
    def first_choice(self, num_layers: int) -> Skips:
        """What to leave out before anything is known."""

    @abstractmethod
    def choose(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> Skips:
        """Learn from a replay of the texts, whose outputs begin at ``starts`` int64 [R]; what
        to leave out from now on."""


@register_method
class LayerSkip(SelfSpeculation):
    config_class = LayerSkipConfig
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
