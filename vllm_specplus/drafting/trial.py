"""Which placement of a draft pays here: all that are possible are run for some rounds at the start.

A round is a pass over new text and the levels of a tree. What it takes is measured with the devices
and the messages that serving will have. What it yields is measured on the draft alone: how far a
chain of fuzzy passes follows that of exact ones, behind texts that the draft itself has drawn. A
target accepts less of both, so that this is the most that fuzziness can cost. A step that drafts
``k`` tokens of worth then takes ``(target + round) / k``, where the target's pass, which cannot run
yet, is taken to read its weights as fast as the draft's pass on one device reads its own.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_specplus.drafting.division import PLACEMENTS, Placement, check_divisible
from vllm_specplus.drafting.easyspec import LayerParallelExecutor, Parts, groups_of
from vllm_specplus.drafting.layer_parts import UnknownLayers
from vllm_specplus.drafting.model import DraftModel

logger = logging.getLogger("vllm.specplus")

#: Texts at a time: a pass over one waits for memory and messages, one over several computes.
LOADS = (1, 8)
#: Rounds that are timed, after two that warm up; tokens that the texts begin with.
ROUNDS, BEGIN = 7, 32
#: Texts that the draft draws, their tokens, and how many of them lie between two chains.
DRAWN, TOKENS, APART = 4, 32, 4


@dataclass(slots=True)
class Rounds:
    """Seconds, medians: of a round, and of one level's pass."""

    round: float
    level: float


@dataclass(slots=True)
class Verdict:
    """What was measured, and what follows from it."""

    placement: Placement
    rounds: dict[str, dict[int, Rounds]]
    """By placement and number of texts."""
    worth: dict[str, float]
    """Tokens of a step, by placement, if the target were the draft."""
    target_seconds: float
    refused: dict[str, str] = field(default_factory=dict)
    """Why a placement is not possible."""

    def step(self, placement: str, load: int) -> float:
        """Seconds of a step per token."""
        return (self.target_seconds + self.rounds[placement][load].round) / self.worth[placement]

    def __str__(self) -> str:
        lines = [
            f"the draft's placement is {self.placement!r}, with the least time per token of the "
            f"placements tried (a step of the target taken as {1e3 * self.target_seconds:.1f} ms):"
        ]
        for name, loads in self.rounds.items():
            times = ", ".join(
                f"{load} texts {1e3 * each.round:.2f} ms a round, "
                f"{1e3 * self.step(name, load):.2f} ms a token"
                for load, each in loads.items()
            )
            lines.append(f"  {name}: {times}; worth {self.worth[name]:.2f} tokens a step")
        lines += [f"  {name}: not possible, {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def possible(model: DraftModel, shards: int) -> tuple[list[Placement], dict[str, str]]:
    """The placements that the draft's layers allow, and why not the others."""
    allowed: list[Placement] = []
    refused = {}
    for placement in PLACEMENTS:
        try:
            check_divisible(model, placement, shards)
            allowed.append(placement)
        except UnknownLayers as error:
            refused[placement] = str(error)
    return allowed, refused


def choose(
    rounds: dict[str, dict[int, Rounds]], worth: dict[str, float], target_seconds: float
) -> Verdict:
    """The placement whose step takes least per token, in the geometric mean over the loads."""
    verdict = Verdict("one_device", rounds, worth, target_seconds)

    def mean(name: Placement) -> float:
        return math.prod(verdict.step(name, load) for load in rounds[name])

    verdict.placement = min((name for name in PLACEMENTS if name in rounds), key=mean)
    return verdict


def try_all(
    model: DraftModel, shards: int, group_size: int, levels: tuple[int, ...], target_bytes: int,
    place: Callable[[Placement, int], LayerParallelExecutor],
) -> Verdict:  # fmt: skip
    """Try what is possible with the whole ``model``. ``place``: a placement, with a cache of so
    many slots, on all shards, in the place of that before; ``levels``: nodes of a tree's levels."""
    allowed, refused = possible(model, shards)
    length = min(BEGIN + 2 * (ROUNDS + 2), model.max_positions - sum(levels))
    slots = max(LOADS) * (length + sum(levels) + 32)
    worth = dict.fromkeys(allowed, float(1 + len(levels)))
    fuzzy = 1 + sum(followed(model, group_size, len(levels)))
    rounds: dict[str, dict[int, Rounds]] = {}
    for placement in allowed:
        if groups_of(placement, model.num_layers, group_size) != groups_of(
            "one_device", model.num_layers, group_size
        ):
            worth[placement] = fuzzy
        executor = place(placement, slots)
        executor.record(sorted(set(levels[:-1])), max(LOADS))
        rounds[placement] = {load: time_rounds(executor, load, length, levels) for load in LOADS}
        del executor
    one_level = rounds["one_device"][1].level
    verdict = choose(rounds, worth, target_bytes / held_bytes(model) * one_level)
    verdict.refused = refused
    logger.info("%s", verdict)
    return verdict


def held_bytes(model: DraftModel) -> int:
    """Bytes of the weights that a pass of a whole draft reads."""
    modules = [part for each in model.layers for part in (each.attention, each.mlp)]
    weights = [weight for part in modules for weight in part.parameters()]
    return sum(weight.nbytes for weight in [*weights, model._head])


def time_rounds(
    executor: LayerParallelExecutor, load: int, length: int, levels: tuple[int, ...]
) -> Rounds:
    """Rounds over ``load`` texts that grow by two tokens each, up to ``length``."""
    device, rng = executor.model.device, np.random.default_rng(0)
    names = [f"trial {i}" for i in range(load)]
    texts = rng.integers(0, executor.model.vocab_size, (load, length)).astype(np.int32)
    active = torch.arange(load, device=device)
    # Of the last level's nodes nobody asks; all nodes of a level lie below the first of the other.
    parents = [-1, *np.cumsum((0, *levels[:-2]))][: len(levels) - 1]
    timed: list[tuple[float, float]] = []
    for end in range(length - 2 * (ROUNDS + 1), length + 1, 2):
        for name in names:
            if not executor.room(name, end):
                raise ValueError(f"the trial's cache has no room for {load} texts of {length}")
        seconds = [_now(device)]
        executor.begin(names, list(texts[:, :end]))
        seconds.append(_now(device))
        for above, width in zip(parents, levels[:-1], strict=True):
            tokens = torch.zeros(load, width, dtype=torch.int64, device=device)
            executor.grow(active, tokens, torch.full_like(tokens, above))
            seconds.append(_now(device))
        passes = np.diff(seconds)
        timed.append((float(passes.sum()), float(np.median(passes[1:] if levels[1:] else passes))))
    for name in names:
        executor.forget(name)
    rounds, level = zip(*timed[2:], strict=True)
    return Rounds(statistics.median(rounds), statistics.median(level))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def followed(model: DraftModel, group_size: int, depth: int) -> list[float]:
    """Shares of chains of ``depth`` most probable tokens that fuzzy passes make as exact ones do,
    up to each depth. The first token is always the same: text is read exactly."""
    length = min(TOKENS, model.max_positions - depth - 1)
    slots = DRAWN * (length + depth + 32)
    exact, fuzzy = (
        LayerParallelExecutor(Parts(model, groups_of(placement, model.num_layers, group_size)),
                              slots, depth)
        for placement in ("one_device", "attentions")
    )  # fmt: skip
    names = [f"drawn {i}" for i in range(DRAWN)]
    generator = torch.Generator(model.device).manual_seed(0)
    first = getattr(model.config, "bos_token_id", None)
    texts = np.zeros((DRAWN, length), np.int32)
    texts[:, 0] = first if isinstance(first, int) and 0 <= first < model.vocab_size else 0
    same = np.zeros((0, depth), bool)
    for end in range(1, length):
        for name in names:
            exact.room(name, end), fuzzy.room(name, end)
        known = list(texts[:, :end])
        logits = exact.begin(names, known)
        if end % APART == 0:
            chains = [
                _chain(each, each.begin(names, known), depth).cpu().numpy()
                for each in (exact, fuzzy)
            ]
            same = np.concatenate((same, np.logical_and.accumulate(chains[0] == chains[1], 1)))
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        texts[:, end] = drawn[:, 0].cpu().numpy()
    return same.mean(0).tolist() if len(same) else [1.0] * depth


def _chain(executor: LayerParallelExecutor, logits: torch.Tensor, depth: int) -> torch.Tensor:
    """The most probable tokens int64 [texts, depth] behind each text's ``logits`` [texts, V]."""
    tokens = [logits.argmax(-1, keepdim=True)]
    active = torch.arange(len(logits), device=logits.device)
    for level in range(depth - 1):
        above = torch.full_like(tokens[-1], level - 1)
        tokens.append(executor.grow(active, tokens[-1], above)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)
