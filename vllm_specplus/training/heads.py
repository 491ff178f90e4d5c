"""Heads in training: the modules that serving runs, and what their recipes share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.drafting.eagle_checkpoint import FAMILIES
from vllm_specplus.strict import quoted
from vllm_specplus.training.batch import Batch
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.language_model import read_model_config
from vllm_specplus.training.measure import Measured, measure
from vllm_specplus.training.probe import Group, Probe
from vllm_specplus.training.recipe import OfModule, Setup
from vllm_specplus.training.slices import slices
from vllm_specplus.training.steps import Chains, ahead
from vllm_specplus.training.texts import Text


def check_family(folder: Path, heads: str = "EAGLE heads are served") -> None:
    """TrainingError unless ``heads``, a clause, for targets like the one in ``folder``."""
    family = read_model_config(folder, "target")["model_type"]
    if family not in FAMILIES:
        raise TrainingError(
            f"target {quoted(folder)} is of type {family!r}, and {heads} for "
            f"{', '.join(FAMILIES)}: train a small draft instead, with the recipe 'distill'"
        )


def layer_ids(asked: list[int] | None, layers: int) -> tuple[int, ...]:
    """The layers whose states are read, ascending as vLLM hands them over; TrainingError for ids
    that a target of so many ``layers`` has not got, and for equal ones."""
    if asked is None:
        default = (2, layers // 2, layers - 3)
        # Of few layers vLLM's choice names some twice, or none.
        fits = len({*default}) == 3 and min(default) >= 0
        asked = sorted(default if fits else {0, layers // 2, layers - 1})
    if not asked or sorted({*asked}) != asked or asked[0] < 0 or asked[-1] >= layers:
        raise TrainingError(
            f"layers {asked}: name layers from 0 to {layers - 1}, each once and in ascending order"
        )
    return tuple(asked)


@contextmanager
def saved(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[str]:
    """A folder, for a while, of which serving makes a head of these."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: each.detach().cpu().clone().contiguous() for name, each in weights.items()}
        save_file(kept, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


def load_head(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: Frozen
) -> EagleHead:
    """The head that serving makes of these, in float32 beside its target, to be trained."""
    with saved(config, weights) as folder:
        head = EagleHead(folder, target, target.vocab_size, target.device, torch.float32)
    head.parts.requires_grad_(True)
    return head


def last_layer(target: Frozen) -> dict[str, Tensor]:
    """The weights of the target's last layer, by canonical name; of a head's layer those are among
    them that have its shapes."""
    state = target.layers[-1].state_dict()
    return {f"layer.{name}": weight for name, weight in state.items()}


def flat(rows: Tensor) -> Tensor:
    """int64 [N]: where ``rows`` bool [B, n] is true, counted over both."""
    return rows.flatten().nonzero()[:, 0]


def at(values: Tensor, places: Tensor) -> Tensor:
    """[N, d] of ``values`` [B, n, d] at ``places`` int64 [N], as :func:`flat` counts. (By
    index_select: its gradient is summed in the same order each time.)"""
    return values.flatten(0, 1).index_select(0, places)


class HeadRecipe(OfModule):
    """A head, its target, and what both say of texts. Recipes add how it learns and is written."""

    name: str

    def __init__(self, head: EagleHead, target: Frozen, layers: tuple[int, ...], setup: Setup):
        """``layers``: whose hidden states it reads, as vLLM counts them; of none: the last state
        behind the last norm."""
        self.head, self.target = head, target
        self._layers, self._device, self._dtype = layers, setup.device, setup.dtype

    def autocast(self) -> torch.autocast:
        """Products in the run's type."""
        low = self._dtype is not torch.float32
        return torch.autocast(self._device.type, torch.bfloat16, enabled=low)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the head reads [B, n, states * hidden], and the target's last hidden states behind
        its norm [B, n, hidden]."""
        states = self.target.states(batch, self._layers)
        return (states.layers if self._layers else states.last), states.last

    # -- what a recipe is, see training/recipe.py -----------------------------------------

    @property
    def module(self) -> nn.Module:
        return self.head.parts

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    def measure(self, texts: list[Text]) -> Measured:
        return measure(self.target, texts, self.pairs, self.paths)

    # -- as served ------------------------------------------------------------------------

    @torch.no_grad()
    def pairs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits float32 [n, vocabulary] of target and head, by slices of the predictions that
        count; but not of a text's second token, before which there is no row."""
        read, last = self.states(batch)
        with self.autocast():
            y = Chains(self.head, read[:, :-1]).step(batch.tokens[:, 1:])
            rows = flat(ahead(batch.learn, 0))
            own, targets = at(y, rows), at(last[:, 1:], rows)
        for here in slices(len(rows)):
            with self.autocast():
                yield self.target.output(targets[here]), self.head.logits(own[here])

    @torch.no_grad()
    def paths(self, probe: Probe) -> Tensor:
        """int64 [S, 1, D]: the head's greedy chains behind the positions of ``probe``; -1 behind a
        text's first token, where no head drafts."""
        paths = torch.full_like(probe.truth, -1)
        done = 0
        for group in probe.groups:
            paths[done : done + len(group.rows)] = self._greedy(group, probe.truth.shape[1])
            done += len(group.rows)
        return paths[:, None]

    def _greedy(self, group: Group, depth: int) -> Tensor:
        """int64 [R, depth], -1 where there is no row."""
        tokens = group.tokens
        everything = self.target.outputs(tokens, group.mask, output_hidden_states=True)
        entering = [everything.hidden_states[n] for n in self._layers]
        read = torch.cat(entering or [everything.last_hidden_state], -1)
        rows, places = group.rows, (group.places - 1).clamp(min=0)
        chain: list[Tensor] = []
        with self.autocast():
            chains, held = Chains(self.head, read[:, :-1]), tokens[:, 1:]
            for _ in range(depth):
                y = chains.step(held)[rows, places]
                chain.append(self.head.logits(y).argmax(-1))
                # (Position 0, which has no row, is taken for position 1, and says the same.)
                held = torch.zeros_like(held).index_put((rows, places), chain[-1])
        found = torch.stack(chain, 1)
        return found.masked_fill((group.places == 0)[:, None], -1)
