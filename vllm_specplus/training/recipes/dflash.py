"""A DFlash head (arXiv 2602.06036): a few layers that fill a block of masks in one pass.

1. *Head.* Layers as wide as the target's, which attend to keys and values that they make of some of
   its hidden states, and an output layer for the most frequent tokens of the texts, the target's
   rows of those. Each layer starts as one of the target's last ones; ``fc`` hands on the last state
   that is read, so that keys and values start as much like the target's own.
2. *Blocks.* Behind anchors that are drawn anew in each step; all blocks of a text in one pass
   (``training/blocks.py``).
3. *Objective.* The text's tokens, each by the weight of its depth, ``exp(-(depth - 1) / gamma)``,
   over the head's tokens; one that it has not got is no loss (the share of the others is logged,
   "covered"). Divergences from the target's distribution, renormalised among the head's tokens, can
   be learnt instead.
4. *Glancing*, which is not DFlash's (Falcon, arXiv 2412.12639): after a first pass some masks are
   replaced by their tokens, the fewer the more was right and the further the run, and the others
   are learnt.

The result is read by ``{"method": "block_tree"}``, and by vLLM's own ``dflash`` if the embedding of
the masks is not learnt: that reads it from a pickled file only, and takes the token's otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.drafting.block_heads import BlockHead
from vllm_specplus.drafting.block_heads import load_head as load_block_head
from vllm_specplus.files import read_json
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.batch import Batch
from vllm_specplus.training.blocks import Blocks, Lesson, all_anchors, decay, draw_anchors
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.export import DFlashFormat, dflash_config, write_head
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.heads import at, check_family, flat, layer_ids, saved
from vllm_specplus.training.losses import Rows
from vllm_specplus.training.measure import Measured, measure
from vllm_specplus.training.mixers import glance_share, glanced, reveal
from vllm_specplus.training.probe import Group, Probe
from vllm_specplus.training.recipe import Defaults, OfModule, Setup
from vllm_specplus.training.schedules import Phases
from vllm_specplus.training.slices import backward_in_slices, slices
from vllm_specplus.training.texts import Text
from vllm_specplus.training.vocabulary import OUTSIDE, DraftVocabulary

SUMMARY = "a DFlash head, which drafts a block in one pass, served by block_tree and vLLM's dflash"
DEFAULTS = Defaults(tokens=400_000, epochs=5, batch_tokens=2048, learning_rate=6e-4)
#: Blocks of a text that are measured in one pass.
SIDE_BY_SIDE = 64


class Settings(StrictModel):
    """Keys of ``--set``."""

    draft_vocabulary: Annotated[int, Field(ge=1)] = 8192
    """Tokens that the head predicts, the most frequent of the texts; all, if it is as many as the
    target has."""
    draft_layers: Annotated[int, Field(ge=1)] = 2
    """Layers of the head; its authors take five."""
    layers: list[int] | None = None
    """Whose hidden states it reads, as vLLM counts them: n is what enters layer n. Without it those
    that ``speculators`` takes: 2, half of the layers, and the last but two."""
    block: Annotated[int, Field(ge=2, le=256)] = 8
    """Rows of a pass: the newest token, and masks, each of which predicts a token."""
    gamma: Annotated[float, Field(gt=0)] = 4.0
    """How slowly the weights of a block's losses fall; its authors' is 4 for blocks of 8, 5 of 10
    and 7 of 16."""
    anchor_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the positions to be learnt that a block is behind in each step."""
    anchors: Annotated[int, Field(ge=1)] = 512
    """Most blocks of a text."""
    loss: str | dict[str, float] = "hard_ce"
    """A loss of ``training/losses.py``, or weights of some."""
    finish: str | dict[str, float] = "hard_ce"
    """The loss in the end."""
    finish_share: float = 0.0
    """Share of the run that ``finish`` has."""
    glancing: bool = False
    """Whether some masks are replaced by their tokens, for which every step takes another pass."""
    learn_mask: bool = True
    """Whether the embedding of a mask is learnt; else it is the target's of ``mask_token``."""
    mask_token: Annotated[int, Field(ge=0)] | None = None
    """The token that stands for a mask; without it the one with the largest id of those that are
    rarest in the texts."""
    kept_gb: float = 6.0
    """Main memory for the target's hidden states, which are computed once as far as they fit, and
    else anew in each epoch: four of them for a token."""


def rarest_token(texts: Iterable[Text], size: int) -> int:
    """The last of the ``size`` tokens that are rarest in ``texts``, prompts included."""
    everything = torch.tensor([t for text in texts for t in text.tokens], dtype=torch.long)
    counts = torch.bincount(everything, minlength=size)
    return size - 1 - int(counts.flip(0).argmin())


def start_weights(target: Frozen, states: int, layers: int) -> dict[str, Tensor]:
    """Weights of a head of so many ``layers`` that reads so many ``states``, by canonical name."""
    size = target.hidden_size
    own = list(target.layers)[-layers:]
    weights = {
        "fc.weight": torch.eye(size).repeat(1, states),
        # As the last of these layers norms what it makes keys and values of.
        "hidden_norm.weight": own[-1].input_layernorm.weight,
        "norm.weight": target.norm_weight,
    }
    weights["fc.weight"][:, : size * (states - 1)] = 0
    for number, layer in enumerate(own):
        given = {name: each for name, each in layer.state_dict().items() if name.endswith("weight")}
        dim = layer.self_attn.head_dim
        for part in "qk":
            given.setdefault(f"self_attn.{part}_norm.weight", torch.ones(dim))
        weights |= {f"layers.{number}.{name}": each for name, each in given.items()}
    return {name: each.detach().float() for name, each in weights.items()}


class DFlashRecipe(OfModule):
    """See the module."""

    name = "dflash"

    def __init__(self, folder: Path, target: Frozen, settings: Settings, setup: Setup):
        self.target, self._settings = target, settings
        known = len(target.layers)
        if settings.draft_layers > known:
            raise TrainingError(
                f"draft_layers {settings.draft_layers}: they start as the target's, which has "
                f"{known}: set at most {known}"
            )
        self._layers = layer_ids(settings.layers, known)
        self._mask_token = _mask_token(settings, setup, target.vocab_size)
        size = min(settings.draft_vocabulary, target.vocab_size)
        own = DraftVocabulary.of(setup.texts, target.vocab_size, size)
        self._vocabulary = DraftVocabulary(own.ids.to(target.device), own.size)
        self._whole = size == target.vocab_size
        self._ids = {} if self._whole else {"d2t": own.d2t, "t2d": own.t2d}
        raw = read_json(folder / "config.json", f"{folder}: its config.json")
        form = DFlashFormat(
            size, self._layers, settings.draft_layers, settings.block, self._mask_token
        )
        self._config = dflash_config(raw, str(folder), form)
        self.head = self._started(setup)
        # What the targets' logits are computed with: of the head's tokens, and of no other.
        self._target_rows = target.output_weight[self._vocabulary.ids].to(setup.dtype)
        self._phases = Phases.of(settings.loss, settings.finish, settings.finish_share)
        self._weights = torch.tensor(decay(settings.block - 1, settings.gamma)).to(target.device)

    def _started(self, setup: Setup) -> BlockHead:
        """The head that serving makes of the start, in float32 beside its target."""
        target, ids = self.target, self._vocabulary.ids
        weights = start_weights(target, len(self._layers), self._settings.draft_layers)
        if not self._whole:
            weights["lm_head.weight"] = target.output_weight[ids].float()
        with saved(self._config, weights | self._ids) as folder:
            head = load_block_head(folder, target, target.vocab_size, target.device, torch.float32)
        assert isinstance(head, BlockHead)
        head.parts.requires_grad_(True)
        if not self._whole:
            # In the type of its products: it is not converted for each slice then.
            head.parts["lm_head"].requires_grad_(False).to(setup.dtype)
        if self._settings.learn_mask:
            mean = target.embed(ids).float().mean(0)
            # Among the parts, as it is written with them.
            head.parts.register_parameter("mask_embedding", nn.Parameter(mean.detach().clone()))
        return head

    @property
    def module(self) -> nn.Module:
        return self.head.parts

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    # -- learning -------------------------------------------------------------------------

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        settings = self._settings
        states = self.target.states(batch, self._layers)
        anchors = draw_anchors(batch.learn, settings.anchor_share, settings.anchors, rng)
        lesson = self._lesson(batch, anchors)
        assert states.layers is not None
        with self.target.autocast():
            blocks = Blocks(self.head, states.layers)
        # (In another context than the pass that learns: autocast keeps the weights that it has
        # converted, of the first pass without their gradients.)
        if settings.glancing:
            lesson = self._glance(blocks, lesson, done, rng)
        with self.target.autocast():
            rows = flat(lesson.learn.flatten(1))
            y = at(self._read(blocks, lesson).flatten(1, 2), rows).float()
        features = at(states.last, lesson.places.flatten()[rows]).to(self._target_rows.dtype)
        labels = self._vocabulary.rows(lesson.truth.flatten()[rows])
        depths = rows % len(self._weights)

        def rows_of(here: slice, own: Tensor) -> Rows:
            with self.target.autocast():
                target_logits = (features[here] @ self._target_rows.T).float()
                return Rows(target_logits, self.head.logits(own), labels[here])

        weights = self._weights[depths]
        weights = weights / weights.sum()
        losses = backward_in_slices(y, rows_of, self._phases.at(done), weights)
        of_depths = [losses[depths == depth] for depth in range(len(self._weights))]
        return {
            "loss": float(losses @ weights),
            "covered": float((labels != OUTSIDE).sum()) / max(len(labels), 1),
            **{
                f"loss {depth}": float(each.sum()) / max(len(each), 1)
                for depth, each in enumerate(of_depths, 1)
            },
        }

    def _lesson(self, batch: Batch, anchors: Tensor) -> Lesson:
        return Lesson.of(batch, anchors, self._settings.block, self._mask_token)

    def _read(self, blocks: Blocks, lesson: Lesson) -> Tensor:
        """y [B, A, D, hidden]; see :meth:`Blocks.rows`."""
        return blocks.rows(lesson.anchors, self._embed(lesson.tokens))

    def _embed(self, tokens: Tensor) -> Tensor:
        """float32 [..., hidden] of ``tokens`` int64 [...], as serving embeds them."""
        embedded = self.target.embed(tokens).float()
        if not self._settings.learn_mask:
            return embedded
        masks = (tokens == self._mask_token)[..., None]
        return torch.where(masks, self.head.parts.get_parameter("mask_embedding"), embedded)

    @torch.no_grad()
    def _glance(self, blocks: Blocks, lesson: Lesson, done: float, rng: torch.Generator) -> Lesson:
        """The lesson with the tokens of some masks, which are then not to be learnt: their rows
        hold what they are to predict."""
        rows = flat(lesson.learn.flatten(1))
        truth, learn = lesson.truth.flatten(), lesson.learn.flatten()
        with self.target.autocast():
            y = at(self._read(blocks, lesson).flatten(1, 2), rows)
        right = torch.zeros_like(learn)
        right[rows] = self._best(y) == truth[rows]
        shown = glanced(right, learn, glance_share(done), rng)
        masks = reveal(lesson.tokens[..., 1:].flatten(), truth, shown).view_as(lesson.truth)
        return lesson._replace(
            tokens=torch.cat((lesson.tokens[..., :1], masks), -1),
            learn=(learn & ~shown).view_as(lesson.learn),
        )

    def _best(self, y: Tensor) -> Tensor:
        """int64 [N]: the most probable tokens of rows ``y`` [N, hidden]."""
        with self.target.autocast():
            best = [self.head.logits(y[here]).argmax(-1) for here in slices(len(y))]
        return self._vocabulary.ids[torch.cat(best)] if best else y.new_zeros(0, dtype=torch.long)

    # -- as served ------------------------------------------------------------------------

    def measure(self, texts: list[Text]) -> Measured:
        return measure(self.target, texts, self.pairs, self.paths)

    @torch.no_grad()
    def pairs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits float32 [n, vocabulary] of target and head, by slices of the predictions that
        count, each of which is the first of a block behind the text before it."""
        states = self.target.states(batch, self._layers)
        assert states.layers is not None
        with self.target.autocast():
            blocks = Blocks(self.head, states.layers)
        for anchors in all_anchors(batch.learn).split(SIDE_BY_SIDE, 1):
            lesson = self._lesson(batch, anchors)
            rows = flat(lesson.learn[..., 0])
            with self.target.autocast():
                own = at(self._read(blocks, lesson)[:, :, 0], rows)
            targets = at(states.last, lesson.places[..., 0].flatten()[rows])
            for here in slices(len(rows)):
                with self.target.autocast():
                    pair = self.target.output(targets[here]), self._logits(own[here])
                yield pair

    def _logits(self, y: Tensor) -> Tensor:
        """float32 [N, vocabulary] of rows ``y`` [N, hidden]."""
        own = self.head.logits(y)
        if self._whole:
            return own
        every = own.new_full((len(own), self._vocabulary.size), float("-inf"))
        return every.index_copy(1, self._vocabulary.ids, own)

    @torch.no_grad()
    def paths(self, probe: Probe) -> Tensor:
        """int64 [S, 1, D]: the most probable token of each depth behind the positions of ``probe``,
        -1 beyond the head's block."""
        found = [self._chains(group) for group in probe.groups]
        if not found:
            return probe.truth[:, None]
        chains = torch.cat(found)[:, : probe.depth]
        return F.pad(chains, (0, probe.depth - chains.shape[1]), value=-1)[:, None]

    def _chains(self, group: Group) -> Tensor:
        """int64 [R, depth of the head]"""
        every = self.target.outputs(group.tokens, group.mask, output_hidden_states=True)
        states = torch.cat([every.hidden_states[n] for n in self._layers], -1)[group.rows]
        held = group.tokens.new_full((len(group.rows), 1, self._settings.block), self._mask_token)
        held[:, 0, 0] = group.tokens[group.rows, group.places]
        with self.target.autocast():
            y = Blocks(self.head, states).rows(group.places[:, None], self._embed(held))
        return self._best(y.flatten(0, 2)).view(len(held), -1)

    def export(self, folder: Path) -> None:
        write_head(folder, self._config, {**self.head.parts.state_dict(), **self._ids})


def _mask_token(settings: Settings, setup: Setup, size: int) -> int:
    """Of the ``size`` tokens that there are; TrainingError if it is none of them."""
    if settings.mask_token is None:
        return rarest_token(setup.texts, size)
    if settings.mask_token >= size:
        raise TrainingError(f"mask_token {settings.mask_token}: the target's ids end at {size - 1}")
    return settings.mask_token


def build(target: Path, settings: Settings, setup: Setup) -> DFlashRecipe:
    """A head for the target in a folder, ready to learn; TrainingError if there can be none."""
    check_family(target, "DFlash heads are trained")
    frozen = Frozen.load(target, setup.device, setup.dtype, int(settings.kept_gb * 1e9))
    return DFlashRecipe(target, frozen, settings, setup)


def work(shape: Shape, settings: Settings) -> Work:
    """See ``training/cost_model.py``."""
    states = len(layer_ids(settings.layers, shape.layers))
    fuse = states * shape.hidden**2
    layers = settings.draft_layers * shape.layer
    context = settings.draft_layers * 2 * shape.hidden * shape.head_dim * shape.kv_heads
    rows = settings.anchor_share * settings.block
    multiplied = fuse + context + rows * layers
    # A first pass without gradient is a third of one with it.
    return Work(
        trained=fuse + layers,
        multiplied=multiplied * (4 / 3 if settings.glancing else 1),
        vocab=min(settings.draft_vocabulary, shape.vocab),
        losses=settings.anchor_share * (settings.block - 1),
        feature_bytes=2 * (states + 1) * shape.hidden,
        kept=int(settings.kept_gb * 1e9),
    )
