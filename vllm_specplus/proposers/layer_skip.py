"""Self-speculation: the target drafts with some of its layers left out.

Draft & Verify (arXiv 2309.08168) and SWIFT (arXiv 2410.06916). The draft is the target
without some attention and MLP blocks: no second model, no training, no second tokenizer.
Weights are the target's own, keys and values of the text are copies of the target's
(``drafting/self_speculation.py``). Levels of the tree, their shape and their verification are
those of ``draft_tree``.

Draft & Verify knows beforehand what to leave out: ``vllm-specplus search-skips`` finds it by
tokens per second. SWIFT finds it while it serves (``drafting/skip_search.py``), by a trial per
step. By default there is one every eighth round, against the best set so far and on the same
tokens; either search rests when it has found enough, and begins anew when acceptance falls.

Of a target on several ranks the first one decides, and all draft (``drafting/lockstep.py``).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.config import Megabytes
from vllm_specplus.drafting.lockstep import LockstepExecutor
from vllm_specplus.drafting.self_speculation import WINDOW, SelfDraftExecutor
from vllm_specplus.drafting.shaped_config import ShapedDraftConfig
from vllm_specplus.drafting.skip_search import Skips, SkipSearch
from vllm_specplus.files import check_readable, read_json
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target

logger = logging.getLogger("vllm.specplus")

#: Rounds of drafting between two replays: of ours, and of SWIFT's search.
REPLAY_EVERY, SWIFT_EVERY = 8, 1
#: Keys of a file that says what to leave out.
SKIP_KEYS = ("skip_attention", "skip_mlp")


def read_skips(path: str) -> dict[str, list[int]]:
    """``skip_attention`` and ``skip_mlp`` of a file that ``vllm-specplus search-skips`` has
    written; ValueError for another."""
    check_readable(path, "'skips'")
    found = read_json(Path(path), f"'skips' {quoted(path)}")
    skips = {key: found.get(key) for key in SKIP_KEYS}
    for key, layers in skips.items():
        fits = isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
        if not fits or len(set(layers)) < len(layers):
            raise ValueError(
                f"'skips' {quoted(path)} has {quoted(layers)} as {key!r}: it must be a list of "
                f"layers, each once, as vllm-specplus search-skips writes it"
            )
    return skips


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
    skips: str | None = None
    """File that says what is left out, written by ``vllm-specplus search-skips``."""
    search: Literal["paired", "swift"] = "paired"
    """How candidates are made and compared, see ``drafting/skip_search.py``."""

    @model_validator(mode="after")
    def _searched_or_given(self):
        given = [key for key in ("skips", *SKIP_KEYS) if getattr(self, key) is not None]
        if given[:1] == ["skips"] and len(given) > 1:
            raise ValueError(
                f"'skips' and {given[1]!r} both say what to leave out: remove one of them"
            )
        for key in ("skip_share", "search"):
            if given and key in self.model_fields_set:
                raise ValueError(
                    f"{key!r} is for the search, and {given[0]!r} says what to leave out: remove "
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
        if self.skips is not None:
            return {**read_skips(self.skips)}
        return {"skip_attention": self.skip_attention, "skip_mlp": self.skip_mlp}


class SelfSpeculation(DraftTree):
    """Drafts with the target's layers; a subclass decides which."""

    _executor: SelfDraftExecutor
    _rounds = 0
    replay_every = REPLAY_EVERY

    def _make_model(self, device: torch.device, dtype: torch.dtype):
        model = self.services.target_layers()
        model.attention_layers = self.attending(model.num_layers)
        return model

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
        self._learn(step, rows, names, texts)
        return super()._begin(step, rows, names, texts)

    def _learn(self, step: StepContext, rows: np.ndarray, names: list, texts: list) -> None:
        """Before a round for the requests ``rows`` int [A]: replay some of their texts, now and
        then."""
        if self._rounds % self.replay_every == self.replay_every - 1:
            # Prompts are not what the target would have said: outputs only.
            outputs = step.num_prompt_tokens[rows] < step.num_tokens[rows] - 1
            if outputs.any():
                here = np.flatnonzero(outputs)
                self._reconsider(
                    [names[i] for i in here], [texts[i] for i in here],
                    step.num_prompt_tokens[rows[here]],
                )  # fmt: skip
        self._rounds += 1

    def _reconsider(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> None:
        chosen = self.choose(names, texts, starts)
        if chosen != self._executor.skips:
            self._executor.skips = chosen
            self.services.count("draft_layer_changes")
            logger.debug("%s now leaves out %s", self.config.method, chosen)

    def _is_beyond(self, length: int) -> bool:
        return False  # its positions are the target's

    def attending(self, num_layers: int) -> list[int]:
        """The layers whose attention some draft may run: of the others nothing is copied."""
        return list(range(num_layers))

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
    config: LayerSkipConfig
    _search: SkipSearch | None = None

    @property
    def _given(self) -> Skips | None:
        """What the user says, instead of a search."""
        attention, mlp = self.config.named_layers().values()
        if attention is None and mlp is None:
            return None
        return Skips(frozenset(attention or ()), frozenset(mlp or ()))

    def attending(self, num_layers: int) -> list[int]:
        given = self._given
        skipped = frozenset() if given is None else given.attention
        return [layer for layer in range(num_layers) if layer not in skipped]

    def first_choice(self, num_layers: int) -> Skips:
        given, config = self._given, self.config
        if given is not None:
            return given
        if config.search == "swift":
            self.replay_every = SWIFT_EVERY
        self._search = SkipSearch(num_layers, config.skip_share, config.search)
        return Skips.of(self._search.best)

    def leave_out(self, skips: Skips) -> None:
        """From now on drafts run without these blocks, and no others are searched."""
        self._search, self._executor.skips = None, skips

    def _verified(self, request: str, drafted: int, accepted: int) -> None:
        super()._verified(request, drafted, accepted)
        if self._search is not None:
            restarts = self._search.restarts
            self._search.accepted(drafted, accepted)
            if self._search.restarts > restarts:
                self.services.count("draft_layer_searches")

    def choose(self, names: list[str], texts: list[np.ndarray], starts: np.ndarray) -> Skips:
        search = self._search
        if search is None or search.resting:
            return self._executor.skips
        if self.config.search == "swift":
            self._try_as_swift(search, names, texts, starts)
        else:
            self._try_in_pairs(search, names, texts, starts)
        return Skips.of(search.best)

    def _try_in_pairs(self, search: SkipSearch, names: list, texts: list, starts: np.ndarray):
        replay, end = self._executor.replay, [self._executor.model.num_layers]
        candidate = search.candidate()
        (right,), seen = replay(names, texts, starts, Skips.of(candidate), end)
        (best_right,), _ = replay(names, texts, starts, self._executor.skips, end)
        search.judge(candidate, int(right), int(best_right), seen)

    def _try_as_swift(self, search: SkipSearch, names: list, texts: list, starts: np.ndarray):
        """The first tokens of a text are predicted; those of shorter ones are not."""
        ends = starts + WINDOW + 1
        long = np.flatnonzero([len(text) >= end for text, end in zip(texts, ends, strict=True)])
        if not len(long):
            return
        candidate = search.candidate()
        (right,), seen = self._executor.replay(
            [names[i] for i in long], [texts[i] for i in long], starts[long] + 1,
            Skips.of(candidate), [self._executor.model.num_layers], ends[long], in_line=True,
        )  # fmt: skip
        search.score(candidate, int(right), seen)
