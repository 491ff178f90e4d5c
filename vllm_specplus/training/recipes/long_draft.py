"""LongSpec's draft (arXiv 2502.17421), for contexts far longer than the texts it learns from.

1. *Draft.* It starts as the target's last layer; its cross-attention, which sees that layer's keys
   and values, as the same layer's attention.
2. *Positions.* A short text keeps the positions of its first tokens, up to ``sinks`` of them, and
   is moved to a random place of a long context with all others (*anchor-offset*). The target reads
   it at the same positions.
3. *Hidden tokens.* When a draft is made the newest tokens are not verified yet: of the target's
   keys and values a row sees none of the last 1 to ``hidden`` positions.
4. *Objective.* At every position the divergence from the target's distribution. (The authors learn
   the texts' tokens: ``hard_ce``.)

The result is read by ``{"method": "long_draft"}``. It has a norm before the target's output layer,
which the authors' drafts have not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.drafting.dense_attention import DenseAttention
from vllm_specplus.drafting.long_checkpoint import FAMILIES, LAST_NORM, NORMS, WINDOW
from vllm_specplus.drafting.long_draft import LongDraft
from vllm_specplus.files import read_json
from vllm_specplus.strict import StrictModel, quoted
from vllm_specplus.training.batch import Batch
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.export import layer_config, write_head
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.heads import at, flat, last_layer, saved
from vllm_specplus.training.language_model import read_model_config
from vllm_specplus.training.losses import Rows, loss_of
from vllm_specplus.training.measure import Measured, measure
from vllm_specplus.training.probe import Group, Probe
from vllm_specplus.training.recipe import Defaults, OfModule, Setup
from vllm_specplus.training.slices import backward_in_slices, slices
from vllm_specplus.training.texts import Text

SUMMARY = "LongSpec's draft for long contexts, served by long_draft"
DEFAULTS = Defaults(tokens=200_000, epochs=4, batch_tokens=2048, learning_rate=1e-3)
#: Positions that the target keeps behind the furthest that a text is moved to.
MARGIN = 1000


class Settings(StrictModel):
    """Keys of ``--set``."""

    loss: str | dict[str, float] = "forward_kl"
    """A loss of ``training/losses.py``, or weights of some."""
    window: Annotated[int, Field(ge=1)] = WINDOW
    """Positions before its own that a row of the draft sees of its own text."""
    sinks: Annotated[int, Field(ge=0)] = 4
    """Most positions at the beginning that stay where they are."""
    reach: Annotated[int, Field(ge=0)] = 30_000
    """Positions of the contexts that short texts are moved in, if the target has as many."""
    short: Annotated[int, Field(ge=0)] = 1200
    """Tokens of the longest text that is moved."""
    hidden: Annotated[int, Field(ge=1)] = 4
    """Most of the newest positions whose keys and values are hidden."""


class Seen(NamedTuple):
    """What the target makes of B texts of n tokens."""

    keys: Tensor
    values: Tensor
    """[B, kv_heads, n, head_dim] of its last layer."""
    last: Tensor
    """[B, n, hidden] behind its last norm."""


def anchored(length: int, sinks: int, offset: int) -> Tensor:
    """int64 [length]: positions of which all but the first ``sinks`` are moved by ``offset``."""
    places = torch.arange(length)
    return places + offset * (places >= sinks)


def verified(length: int, hidden: int) -> Tensor:
    """bool [1, length, length]: which of the target's keys the row of each position sees, where so
    many of the newest are ``hidden``; the first one always, since no draft is made without any."""
    places = torch.arange(length)
    return (places <= (places[:, None] - hidden).clamp(min=0))[None]


def start_weights(target: Frozen) -> dict[str, Tensor]:
    """Weights of a draft both of whose attentions are that of the target's last layer, by canonical
    name. Norms that it has beside queries and keys have no place in it."""
    given = {name.removeprefix("layer."): each for name, each in last_layer(target).items()}
    weights = {name: each for name, each in given.items() if "_proj." in name}
    weights |= {
        name.replace("self_attn", "cross_attn"): each for name, each in weights.items()
        if name.startswith(("self_attn.q_proj", "self_attn.o_proj"))
    }  # fmt: skip
    before, behind = given["input_layernorm.weight"], given["post_attention_layernorm.weight"]
    norms = zip((*NORMS, LAST_NORM), (before, before, behind, target.norm_weight), strict=True)
    weights |= {f"{name}.weight": each for name, each in norms}
    return {name: each.float() for name, each in weights.items()}


def load_draft(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: Frozen
) -> LongDraft:
    """The draft that serving makes of these, in float32 beside its target, to be trained."""
    with saved(config, weights) as folder:
        draft = LongDraft(folder, target, target.device, torch.float32)
    draft.parts.requires_grad_(True)
    return draft


class LongDraftRecipe(OfModule):
    """See the module."""

    name = "long_draft"

    def __init__(self, folder: Path, target: Frozen, settings: Settings):
        raw = read_json(folder / "config.json", f"{folder}: its config.json")
        self._config = layer_config(raw) | {
            "architectures": ["LongSpecDraft"], "dtype": "bfloat16", "draft_window": settings.window
        }  # fmt: skip
        self.target, self._settings, self._loss = target, settings, loss_of(settings.loss)
        self.draft = load_draft(self._config, start_weights(target), target)

    @property
    def module(self) -> nn.Module:
        return self.draft.parts

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        length = batch.tokens.shape[1]
        positions = self._positions(length, rng)
        hidden = _drawn(1, self._settings.hidden, rng)
        seen = self.read(batch.tokens, batch.mask, positions)
        with self.target.autocast():
            every = self.rows(batch.tokens, positions, seen, verified(length, hidden))
            rows = flat(batch.learn)
            y, targets = at(every, rows).float(), at(seen.last, rows)
        labels = batch.tokens[:, 1:][batch.learn[:, :-1]]

        def rows_of(here: slice, own: Tensor) -> Rows:
            features = targets[here]
            return Rows(
                self.target.output(features), self.draft.logits(own), labels[here], features, own
            )

        losses = backward_in_slices(y, rows_of, self._loss)
        return {"loss": float(losses.sum()) / max(len(rows), 1)}

    def _positions(self, length: int, rng: torch.Generator) -> Tensor:
        """int64 [length] of the texts of a batch that is so long."""
        settings = self._settings
        if length > settings.short:
            return anchored(length, 0, 0).to(self.target.device)
        known = self.draft.max_positions - MARGIN
        offset = _drawn(0, max(min(settings.reach, known) - length, 0), rng)
        return anchored(length, _drawn(0, settings.sinks, rng), offset).to(self.target.device)

    @torch.no_grad()
    def read(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Seen:
        """What the target makes of ``tokens`` int64 [B, n], of which ``mask`` bool [B, n] are text,
        at ``positions`` int64 [n]."""
        from transformers import DynamicCache

        cache = DynamicCache()
        last = self.target.read(
            tokens, mask, position_ids=positions.expand(len(tokens), -1), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return Seen(cache.layers[-1].keys, cache.layers[-1].values, last)

    def rows(self, tokens: Tensor, positions: Tensor, seen: Seen, sees: Tensor) -> Tensor:
        """y [B, n, hidden] of the draft's rows of ``tokens`` int64 [B, n]; ``sees`` bool
        [B or 1, n, S]: which of the S positions that are ``seen`` each row sees."""
        texts, length = tokens.shape
        sees = sees.to(tokens.device)[:, None]

        def cross(query: Tensor, scale: float) -> Tensor:
            query = query.unflatten(0, (texts, length)).transpose(1, 2)
            keys, values = (each.to(query.dtype) for each in (seen.keys, seen.values))
            out = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=sees, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2).flatten(0, 1)

        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        attend = DenseAttention(causal.expand(texts, 1, -1, -1))
        rotary = self.draft.rotary(positions.repeat(texts))
        return self.draft(tokens.flatten(), rotary, attend, cross).unflatten(0, tokens.shape)

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    # -- as served ------------------------------------------------------------------------

    def measure(self, texts: list[Text]) -> Measured:
        return measure(self.target, texts, self.pairs, self.paths)

    @torch.no_grad()
    def pairs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits float32 [n, vocabulary] of target and draft, by slices of the predictions that
        count, at the texts' own positions."""
        length = batch.tokens.shape[1]
        positions = anchored(length, 0, 0).to(batch.tokens.device)
        seen = self.read(batch.tokens, batch.mask, positions)
        with self.target.autocast():
            every = self.rows(batch.tokens, positions, seen, verified(length, 1))
            rows = flat(batch.learn)
            own, targets = at(every, rows), at(seen.last, rows)
        for here in slices(len(rows)):
            with self.target.autocast():
                yield self.target.output(targets[here]), self.draft.logits(own[here])

    @torch.no_grad()
    def paths(self, probe: Probe) -> Tensor:
        """int64 [S, 1, D]: the draft's greedy chains behind the positions of ``probe``; -1 behind a
        text's first token, where nothing of the target can be seen."""
        depth = probe.truth.shape[1]
        chains = [self._greedy(group, depth) for group in probe.groups]
        return (torch.cat(chains) if chains else probe.truth)[:, None]

    def _greedy(self, group: Group, depth: int) -> Tensor:
        """int64 [R, depth]"""
        device, places = group.tokens.device, group.places
        read = anchored(group.tokens.shape[1], 0, 0).to(device)
        seen = Seen(*(each[group.rows] for each in self.read(group.tokens, group.mask, read)))
        tokens = F.pad(group.tokens, (0, depth))[group.rows]
        positions = anchored(tokens.shape[1], 0, 0).to(device)
        # Of all rows: of those before the places nobody asks.
        sees = (read < places.clamp(min=1)[:, None])[:, None].expand(-1, tokens.shape[1], -1)
        each = torch.arange(len(tokens), device=device)
        for step in range(depth):
            with self.target.autocast():
                y = self.rows(tokens, positions, seen, sees)[each, places + step]
                tokens[each, places + step + 1] = self.draft.logits(y).argmax(-1)
        behind = places[:, None] + 1 + torch.arange(depth, device=device)
        return tokens.gather(1, behind).masked_fill((places == 0)[:, None], -1)

    def export(self, folder: Path) -> None:
        write_head(folder, self._config, self.draft.parts.state_dict())


def _drawn(least: int, most: int, rng: torch.Generator) -> int:
    """One of the numbers from ``least`` to ``most``, each as probable."""
    return int(torch.randint(least, most + 1, (), generator=rng, device=rng.device))


def build(target: Path, settings: Settings, setup: Setup) -> LongDraftRecipe:
    """A draft for the target in a folder, ready to learn; TrainingError if there can be none."""
    family = read_model_config(target, "target")["model_type"]
    if family not in FAMILIES:
        raise TrainingError(
            f"target {quoted(target)} is of type {family!r}, and long drafts are served for "
            f"{', '.join(FAMILIES)}: train a small draft instead, with the recipe 'distill'"
        )
    return LongDraftRecipe(target, Frozen.load(target, setup.device, setup.dtype), settings)


def work(shape: Shape, settings: Settings) -> Work:
    """See ``training/cost_model.py``."""
    trained = shape.layer + 2 * shape.hidden * shape.heads * shape.head_dim
    return Work(
        trained=trained, multiplied=trained, vocab=shape.vocab, target_layers=shape.layers
    )  # fmt: skip
