"""``distill``: a small draft learns what its target would say (DistillSpec, arXiv 2310.08461).

1. *Draft.* Some of the target's own layers, their MLPs perhaps cut to the neurons with the largest
   weights, between the target's own embedding and output layer, which stay as they are; or a small
   model of the same tokenizer (``draft``), all of which learns.
2. *Texts.* What the target has written, or, in each epoch anew, what the draft itself writes behind
   the same prompts (on-policy), or a mixture of both by sequence or by token.
3. *Objective.* At every position the divergence of the draft's distribution from the target's;
   which one, is a setting, and may be another towards the end of the run.

Two methods choose at which positions. AdaSPEC (arXiv 2510.19779): with a ``reference``, a draft
that was distilled from everything, only the share ``keep`` where the draft is worst beside it. OSD
(arXiv 2310.07177): where a draft was ``rejected`` while serving, for replayed traffic.

The package ``speculators`` trains no separate models; transformers' and TRL's trainers know no
target's distribution at bounded memory. So this is ours. It writes a Hugging Face folder, which
``draft_tree``, ``easyspec`` and vLLM's own ``draft_model`` serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_specplus.drafting.model import DraftModelError, check_target
from vllm_specplus.strict import StrictModel, quoted
from vllm_specplus.training.batch import Batch
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.data import language_of
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.language_model import LanguageModel, load_model, read_model_config
from vllm_specplus.training.losses import Loss, Rows, forward_kl, loss_of
from vllm_specplus.training.measure import Measured, measure
from vllm_specplus.training.model_folder import own_dtype, stored, write_model
from vllm_specplus.training.recipe import Defaults, OfModule, Setup
from vllm_specplus.training.sampling import write_on
from vllm_specplus.training.schedules import Phases
from vllm_specplus.training.selectors import rejected, top_quantile
from vllm_specplus.training.slices import backward_in_slices, losses_in_slices, slices
from vllm_specplus.training.texts import Text

SUMMARY = "a small draft model, from some of the target's layers; served by draft_tree"
DEFAULTS = Defaults(tokens=400_000, epochs=3, batch_tokens=2048, learning_rate=1e-3)

#: Lists of a configuration with an entry for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers")

Divergence = str | dict[str, float]


class Settings(StrictModel):
    """Keys of ``--set`` for ``distill``."""

    draft: str | None = None
    """Folder of a small model of the target's tokenizer to start from; null: the target's own
    ``layers``."""
    layers: list[int] = Field(default=[0, -1], min_length=1)
    """Layers of the target that the draft starts from, in this order; -1 is the last one."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Neurons that each of their MLPs keeps; null: all."""
    loss: Divergence = "forward_kl"
    """A name, or names with weights: forward_kl, reverse_kl, jensen_shannon, total_variation,
    acceptance, soft_ce, hard_ce, list_mle."""
    finish_loss: Divergence = "total_variation"
    """The same, for the end of the run."""
    finish_share: float = Field(default=0.4, ge=0, le=1)
    """How much of the run that is."""
    source: Literal["target", "draft", "mix_sequence", "mix_token"] = "target"
    """Who writes what is learnt from. What the draft has a part in is written anew every epoch."""
    draft_share: float = Field(default=0.5, gt=0, lt=1)
    """Of a mixture: the share of texts, or of tokens, that the draft writes."""
    temperature: float = Field(default=1.0, ge=0)
    """At which it writes."""
    answer_tokens: int = Field(default=160, ge=1)
    """The most that it writes behind a prompt."""
    positions: Literal["all", "rejected"] = "all"
    """Where to learn: everywhere, or where a draft was rejected when the text was served."""
    reference: str | None = None
    """Folder of an earlier result of this recipe: learn only where the draft is worse than it."""
    keep: float = Field(default=0.4, gt=0, le=1)
    """The share of positions that is learnt from beside a reference."""

    @field_validator("loss", "finish_loss")
    @classmethod
    def _is_a_loss(cls, value: Divergence) -> Divergence:
        loss_of(value)
        if "smooth_l1" in value:
            raise TrainingError(
                "'smooth_l1' compares hidden states, which a draft model has of its own: use a "
                "loss of distributions, as 'forward_kl'"
            )
        return value

    @model_validator(mode="after")
    def _one_start(self) -> Settings:
        if self.draft is not None and self.model_fields_set & {"layers", "intermediate_size"}:
            raise TrainingError(
                "'layers' and 'intermediate_size' are for drafts made of the target's layers, and "
                "'draft' names another model: leave out one or the other"
            )
        return self


class Distill(OfModule):
    """The draft, its target, and perhaps a reference."""

    name = "distill"

    def __init__(
        self, draft: nn.Module, target: Frozen, folder: Path, settings: Settings, setup: Setup,
        reference: Frozen | None = None,
    ):  # fmt: skip
        self.draft, self.target = LanguageModel(draft, setup.dtype), target
        self._folder, self._settings, self._seed = folder, settings, setup.seed
        self._reference = reference
        self._phases = Phases.of(settings.loss, settings.finish_loss, settings.finish_share)
        self._vocab = min(self.draft.vocab_size, target.vocab_size)

    @property
    def module(self) -> nn.Module:
        return self.draft.model

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        count = max(int(batch.learn.sum()), 1)
        learn = rejected(batch) if self._settings.positions == "rejected" else batch.learn
        drafted = self.draft.read(batch.tokens, batch.mask)[learn]
        if self._reference is not None:
            chosen = self._worse_than_reference(batch, learn, drafted.detach())
            learn, drafted = learn.masked_scatter(learn, chosen), drafted[chosen]
        weights = torch.full((len(drafted),), 1 / count, device=drafted.device)
        rows = self._rows(batch, learn)
        losses = backward_in_slices(drafted, rows, self._phases.at(done), weights)
        return {"loss": float(losses.sum()) / count, "learnt": len(losses) / count}

    def texts_for(self, epoch: int, texts: Sequence[Text]) -> list[Text] | None:
        settings = self._settings
        if settings.source == "target":
            return None
        for frozen in (self.target, self._reference):
            if frozen is not None:
                frozen.forget_drafted()
        rng = torch.Generator().manual_seed((self._seed << 20) + epoch)
        # Texts of the target are there already: only those of the draft are written.
        kept: list[Text] = []
        if settings.source == "mix_sequence":
            by_draft = torch.rand(len(texts), generator=rng) < settings.draft_share
            drawn = list(zip(texts, by_draft.tolist(), strict=True))
            kept = [text for text, written in drawn if not written]
            texts = [text for text, written in drawn if written]
        by_token = settings.source == "mix_token"
        with self.draft.autocast():
            return kept + write_on(
                self.draft.model, self.target.model, texts,
                settings.draft_share if by_token else 1.0, "token" if by_token else "sequence",
                settings.temperature, settings.answer_tokens, rng,
            )  # fmt: skip

    def measure(self, texts: list[Text]) -> Measured:
        return measure(self.target, texts, self._pairs, lambda probe: probe.chains(self.draft))

    def export(self, folder: Path) -> None:
        """A model's folder; in its sub-folder ``own``, of a draft made of the target's layers, what
        training has changed: a fraction of it where the vocabulary is large."""
        dtype = own_dtype(self._folder)
        write_model(self.draft.model, folder, self._folder, dtype)
        if self._settings.draft is None:
            (folder / "own").mkdir()
            save_file(stored(self.state(), dtype), folder / "own" / "layers.safetensors")

    def _rows(self, batch: Batch, learn: Tensor) -> Any:
        """What losses read at the positions ``learn`` bool [B, n]; see ``slices.RowsOf``."""
        targets = self.target.states(batch).last[learn]
        labels = batch.tokens[:, 1:][learn[:, :-1]]  # the last position predicts nothing known

        def rows(here: slice, drafted: Tensor) -> Rows:
            with torch.no_grad():
                target = self.target.output(targets[here])[:, : self._vocab]
            return Rows(target, self.draft.output(drafted)[:, : self._vocab], labels[here])

        return rows

    @torch.no_grad()
    def _worse_than_reference(self, batch: Batch, learn: Tensor, drafted: Tensor) -> Tensor:
        """bool [N] of the positions ``learn``: AdaSPEC's selection."""
        reference, rows = self._reference, self._rows(batch, learn)
        assert reference is not None
        known = reference.states(batch).last[learn]

        def of_reference(here: slice, states: Tensor) -> Rows:
            whole = rows(here, drafted[here])
            return whole._replace(draft_logits=reference.output(states)[:, : self._vocab])

        loss: Loss = forward_kl
        own = losses_in_slices(drafted, rows, loss)
        return top_quantile(own - losses_in_slices(known, of_reference, loss), self._settings.keep)

    @torch.no_grad()
    def _pairs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        drafted = self.draft.read(batch.tokens, batch.mask)[batch.learn]
        rows = self._rows(batch, batch.learn)
        for here in slices(len(drafted)):
            target, draft, *_ = rows(here, drafted[here])
            yield target, draft


def start(target: Frozen, settings: Settings) -> nn.Module:
    """A float32 draft of some of the target's layers, whose embedding and output layer are the
    target's own; TrainingError for layers that it has not got, or cannot cut."""
    from transformers import AutoModelForCausalLM

    count = len(target.layers)
    if not all(-count <= n < count for n in settings.layers):
        raise TrainingError(
            f"'layers' is {quoted(settings.layers)}, and the target has {count}: name some from 0 "
            f"to {count - 1}, or -1 for the last"
        )
    chosen = [n % count for n in settings.layers]
    given = target.config.to_dict() | {"num_hidden_layers": len(chosen)}
    for key in _BY_LAYER:
        if isinstance(given.get(key), list):
            given[key] = [given[key][n] for n in chosen]
    if settings.intermediate_size is not None:
        given["intermediate_size"] = settings.intermediate_size
    config = type(target.config)(**given)
    draft = AutoModelForCausalLM.from_config(config).float().to(target.device).eval()
    draft.requires_grad_(False)
    draft.model.embed_tokens, draft.lm_head = target.body.embed_tokens, target.model.lm_head
    draft.model.norm.load_state_dict(target.body.norm.state_dict())
    for new, old in zip(draft.model.layers, chosen, strict=True):
        state = target.layers[old].state_dict()
        new.load_state_dict(narrowed(state, settings.intermediate_size))
    draft.model.layers.requires_grad_(True)
    draft.model.norm.requires_grad_(True)
    return draft


def narrowed(layer: dict[str, Tensor], neurons: int | None) -> dict[str, Tensor]:
    """A layer's weights with those ``neurons`` of its MLP only whose weights are largest."""
    if neurons is None:
        return layer
    names = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    if not layer.keys() >= set(names):
        raise TrainingError(
            "'intermediate_size' cuts MLPs of a gate, an up and a down projection, and the "
            "target's are others: leave it out"
        )
    gate, up, down = (layer[name].float() for name in names)
    if neurons > len(gate):
        raise TrainingError(
            f"'intermediate_size' is {neurons}, and the target's MLPs have {len(gate)} neurons: "
            f"set at most that"
        )
    weight = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = weight.topk(neurons).indices.sort().values
    cut = {f"mlp.{part}_proj.{what}" for part in ("gate", "up") for what in ("weight", "bias")}
    narrow = {name: each[kept] if name in cut else each for name, each in layer.items()}
    return narrow | {names[2]: layer[names[2]][:, kept]}


def load_draft(
    folder: Path, target: Path, what: str, setup: Setup, dtype: torch.dtype
) -> nn.Module:
    """A model of the target's tokenizer; TrainingError if it is another's."""
    language = language_of(target)
    read_model_config(folder, what)
    try:
        check_target(str(folder), language.tokenizer, language.vocab)
    except DraftModelError as error:
        raise TrainingError(str(error)) from None
    return load_model(folder, what, dtype, setup.device)


def build(target: Path, settings: Settings, setup: Setup) -> Distill:
    """Reads the target, and starts the draft."""
    if settings.positions == "rejected" and not any(0 in text.labels for text in setup.texts):
        raise TrainingError(
            "positions='rejected' learns where a draft was rejected, and no text says where that "
            "was: give --data rows with 'rejected', or leave it out"
        )
    frozen = Frozen.load(target, setup.device, setup.dtype)
    if settings.draft is None:
        torch.manual_seed(setup.seed)
        draft = start(frozen, settings)
    else:
        folder = Path(settings.draft)
        draft = load_draft(folder, target, "draft", setup, torch.float32).requires_grad_(True)
    reference = None
    if settings.reference is not None:
        folder = Path(settings.reference)
        reference = Frozen(load_draft(folder, target, "reference", setup, setup.dtype), setup.dtype)
    return Distill(draft, frozen, target, settings, setup, reference)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs; see ``training/cost_model.py``."""
    if settings.draft is None:
        mlp = settings.intermediate_size or shape.intermediate
        cut = 3 * shape.hidden * (shape.intermediate - mlp)
        trained = multiplied = len(settings.layers) * (shape.layer - cut)
    else:
        own = Shape.of(Path(settings.draft))
        trained, multiplied = own.parameters, own.layers * own.layer
    on_policy = {
        "target": 0.0,
        "draft": 1.0,
        "mix_sequence": settings.draft_share,
        "mix_token": 1.0,
    }
    written = on_policy[settings.source]
    return Work(
        trained=trained,
        multiplied=multiplied,
        vocab=shape.vocab,
        losses=1.0 if settings.reference is None else 2.0,
        target_layers=shape.layers if written else 0,
        feature_bytes=2 * shape.hidden,
        draft_written=written,
    )
