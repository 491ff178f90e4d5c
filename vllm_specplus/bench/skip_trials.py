"""Draft & Verify's search for the layers that a draft leaves out (arXiv 2309.08168, section 4).

A trial serves a few prompts, one after another, with a set of attentions and MLPs left out, and
measures tokens per second: what is looked for, instead of a guess at it from acceptance. Which set
is tried next, Bayesian optimisation says, over a number in [0, 1] for each block, left out above
0.5. Every trial is written down at once; a search that was ended goes on behind the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplus.bench import InputError
from vllm_specplus.drafting.bayes import Bayes
from vllm_specplus.drafting.skip_search import Skips

#: Where a number says that a block is left out.
LEFT_OUT = 0.5

Measure = Callable[[Skips], float]
"""Tokens per second with these blocks left out."""


@dataclass(frozen=True)
class Trial:
    """One set, and what came of it."""

    point: tuple[float, ...]
    """Of the attentions of all layers, then of their MLPs."""
    tokens_per_s: float

    @property
    def skips(self) -> Skips:
        """What the point leaves out."""
        return skips_of(np.array(self.point))


def skips_of(point: np.ndarray) -> Skips:
    """The blocks that a point float64 [2 L] leaves out."""
    attention, mlp = (np.flatnonzero(each > LEFT_OUT).tolist() for each in np.split(point, 2))
    return Skips(frozenset(attention), frozenset(mlp))


class SkipTrials:
    """The trials of a search, in a file of a line for each behind one that says what was asked."""

    def __init__(self, file: Path, about: dict[str, Any], num_layers: int):
        """``about``: what trials are comparable under; InputError if the file is of others."""
        self._file, self._num_layers = file, num_layers
        self._about = {**about, "num_layers": num_layers}
        self.trials: list[Trial] = []
        if file.exists():
            self._read()
        else:
            self._append(self._about)
        self._bayes = Bayes(2 * num_layers, seed=len(self.trials))
        for trial in self.trials:
            self._bayes.tell(np.array(trial.point), trial.tokens_per_s)

    def _read(self) -> None:
        raw = self._file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]  # what was being written when it ended is not
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        if not lines or lines[0] != self._about:
            raise InputError(
                f"{self._file} holds trials of another search "
                f"({json.dumps(lines[0] if lines else None)}): name another file, or remove it"
            )
        self.trials = [Trial(tuple(line["point"]), line["tokens_per_s"]) for line in lines[1:]]
        os.truncate(self._file, len(whole))

    def _append(self, row: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def best(self) -> Trial:
        """Of all trials the one with most tokens per second."""
        return max(self.trials, key=lambda trial: trial.tokens_per_s)

    def run(self, measure: Measure, count: int) -> Iterator[Trial]:
        """Make trials until there are ``count`` in all."""
        while len(self.trials) < count:
            point = np.round(self._next(), 4)
            trial = Trial(tuple(point.tolist()), measure(skips_of(point)))
            self._bayes.tell(point, trial.tokens_per_s)
            self.trials.append(trial)
            self._append({"point": trial.point, "tokens_per_s": trial.tokens_per_s})
            yield trial

    def _next(self) -> np.ndarray:
        if self.trials:
            return self._bayes.propose()
        # SWIFT's: every other layer, the first and the last one not among them.
        odd = np.arange(self._num_layers) % 2 == 1
        odd[-1] = False
        return np.tile(odd, 2).astype(float)

    def result(self) -> dict[str, Any]:
        """What ``layer_skip`` reads as ``skips``, and where it comes from."""
        best = self.best
        return {
            "skip_attention": sorted(best.skips.attention), "skip_mlp": sorted(best.skips.mlp),
            "tokens_per_s": best.tokens_per_s, "trials": len(self.trials), **self._about,
        }  # fmt: skip
