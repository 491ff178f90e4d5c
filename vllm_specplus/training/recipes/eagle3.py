"""An EAGLE-3 head (arXiv 2503.01840): three of the target's hidden states in, its own tokens out.

1. *Head.* One layer as wide as the target's behind an ``fc`` that fuses the states; an output layer
   for the most frequent tokens of the texts. It starts as a regression: ``fc`` is fitted to what
   the target's last norm sees one token later, and the layer, which begins as the target's last
   one, adds nothing yet.
2. *Objective.* At each step of the training-time test (``training/steps.py``) a divergence of the
   head's distribution from the target's, both over the head's tokens: the target's is renormalised
   among them. What it gives to others no head of that vocabulary could learn, and computing it
   would take as many logits as the target has tokens, six times the embedded model's head's. What
   share of the texts the head's tokens are is logged with each step ("covered"), and what is
   measured afterwards counts all tokens.

The result is read by ``{"method": "eagle_tree"}``, by ``rasd`` and by vLLM's own ``eagle3``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_specplus.files import read_json
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.batch import Batch, collate
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.export import Eagle3Format, eagle3_config, write_head
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.heads import (
    HeadRecipe,
    at,
    check_family,
    flat,
    last_layer,
    layer_ids,
    load_head,
)
from vllm_specplus.training.losses import Rows
from vllm_specplus.training.mixers import noise
from vllm_specplus.training.recipe import Defaults, Setup
from vllm_specplus.training.schedules import Phases
from vllm_specplus.training.slices import backward_in_slices
from vllm_specplus.training.steps import Chains, ahead, step_weights
from vllm_specplus.training.texts import Text
from vllm_specplus.training.vocabulary import OUTSIDE, DraftVocabulary

SUMMARY = "an EAGLE-3 head, served by eagle_tree and rasd, and by vLLM's eagle3"
DEFAULTS = Defaults(tokens=400_000, epochs=5, batch_tokens=2048, learning_rate=1e-3)

#: Tokens that the start is fitted to, and its ridge, in parts of the mean square of an input.
FITTED, RIDGE = 20_000, 0.01


class Settings(StrictModel):
    """Keys of ``--set``."""

    draft_vocabulary: int = 8192
    """Tokens that the head predicts, the most frequent of the texts; all, if it is as many as the
    target has."""
    learn_output: bool = False
    """Whether the output layer is learnt; else it is the target's rows of those tokens."""
    steps: int = 3
    """Steps of the training-time test."""
    step_decay: float = 0.8
    """Weight of a step's loss, in parts of that of the step before."""
    layers: list[int] | None = None
    """Whose hidden states it reads, as vLLM counts them: n is what enters layer n. Without it those
    that vLLM takes: 2, half of the layers, and the last but two."""
    loss: str | dict[str, float] = "forward_kl"
    """A loss of ``training/losses.py``, or weights of some."""
    finish: str | dict[str, float] = "forward_kl"
    """The loss in the end."""
    finish_share: float = 0.0
    """Share of the run that ``finish`` has."""
    noise: float = 0.0
    """Uniform noise, up to so much, on the target's states."""
    kept_gb: float = 6.0
    """Main memory for the target's hidden states, which are computed once as far as they fit, and
    else anew in each epoch: four of them for a token."""


class Fit(NamedTuple):
    """What the target computes of a token, foretold from what it has computed of the one before."""

    fc: Tensor
    """float32 [hidden, states * hidden]."""
    scale: float
    """Root mean square of what is foretold, in parts of that of the truth: below 1, as a regression
    does not foretell what it cannot know."""


@torch.no_grad()
def fit_fc(target: Frozen, layers: tuple[int, ...], texts: Sequence[Text]) -> Fit:
    """Ridge regression, from the normalised states of ``layers`` at a position to the normalised
    last state at the next one, over the first ``FITTED`` tokens of ``texts``."""
    size = target.hidden_size
    width = size * len(layers)
    squares = torch.zeros(width, width, dtype=torch.float64, device=target.device)
    products = torch.zeros(width, size, dtype=torch.float64, device=target.device)
    norm = target.norm_weight.double()
    count, power = 0, 0.0
    for text in texts:
        if count >= FITTED:
            break
        states = target.states(collate([text]), layers)
        each = states.layers[0, :-1].double().unflatten(-1, (len(layers), size))
        read = (each * each.square().mean(-1, keepdim=True).rsqrt()).flatten(1)
        truth = torch.where(norm.abs() > 1e-3, states.last[0, 1:].double() / norm, 0.0)
        squares += read.T @ read
        products += read.T @ truth
        count, power = count + len(read), power + float(truth.square().sum())
    ridge = RIDGE * count * torch.eye(width, dtype=torch.float64, device=target.device)
    fc = torch.linalg.solve(squares + ridge, products).T
    foretold = float(((fc @ squares) * fc).sum())
    return Fit(fc.float().cpu(), (foretold / power) ** 0.5)


def start_weights(target: Frozen, fit: Fit, output: Tensor | None) -> dict[str, Tensor]:
    """Weights of a head that begins as ``fit``, beside the target's last layer without its outputs;
    ``output`` [k, hidden]: its output layer."""
    given = last_layer(target)
    weights = {
        "fc.weight": fit.fc,
        # Else the norm would make what is hardly foretold as sure as what is known.
        "norm.weight": target.norm_weight * fit.scale,
        "layer.hidden_norm.weight": given["layer.input_layernorm.weight"],
        "layer.input_layernorm.weight": given["layer.input_layernorm.weight"],
        "layer.post_attention_layernorm.weight": given["layer.post_attention_layernorm.weight"],
    }
    for part in "qkv":
        weight = given[f"layer.self_attn.{part}_proj.weight"]
        weights[f"layer.self_attn.{part}_proj.weight"] = torch.cat((weight, weight), 1)
    for part in ("mlp.gate", "mlp.up"):
        weights[f"layer.{part}_proj.weight"] = given[f"layer.{part}_proj.weight"]
    for part in ("self_attn.o", "mlp.down"):
        # The last layer's own would add, to a state of another size, what belongs to another token.
        weights[f"layer.{part}_proj.weight"] = torch.zeros_like(given[f"layer.{part}_proj.weight"])
    for number in range(fit.fc.shape[1] // target.hidden_size):
        weights[f"fc_norm.{number}.weight"] = torch.ones(target.hidden_size)
    if output is not None:
        weights["lm_head.weight"] = output
    return {name: weight.float() for name, weight in weights.items()}


class _Lesson(NamedTuple):
    """The rows of all steps that count, in the order of the steps."""

    y: Tensor
    """[N, hidden], with its graph."""
    targets: Tensor
    """int64 [N]: which of the batch's learnt positions each is to predict from."""
    counts: list[int]
    """Rows of each step."""


class Eagle3Recipe(HeadRecipe):
    """See the module."""

    name = "eagle3"

    def __init__(self, folder: Path, target: Frozen, settings: Settings, setup: Setup):
        self._folder, self._settings = folder, settings
        layers = layer_ids(settings.layers, len(target.layers))
        size = min(settings.draft_vocabulary, target.vocab_size)
        own = DraftVocabulary.of(setup.texts, target.vocab_size, size)
        whole = size == target.vocab_size
        self._ids = {} if whole else {"d2t": own.d2t, "t2d": own.t2d}
        needs_output = settings.learn_output or not whole
        output = target.output_weight[own.ids.to(target.device)] if needs_output else None
        self._format = Eagle3Format(size, layers, settings.steps, fc_norm=True)
        weights = start_weights(target, fit_fc(target, layers, setup.texts), output)
        super().__init__(
            load_head(self._config(), weights | self._ids, target), target, layers, setup
        )
        if needs_output and not settings.learn_output:
            # In the type of its products: it is not converted for each slice then.
            self.head.parts["lm_head"].requires_grad_(False).to(setup.dtype)
        self._vocabulary = DraftVocabulary(own.ids.to(target.device), own.size)
        self._target_rows = target.output_weight[self._vocabulary.ids].to(setup.dtype)
        self._phases = Phases.of(settings.loss, settings.finish, settings.finish_share)
        self._weights = step_weights(settings.steps, settings.step_decay)

    def _config(self) -> dict:
        raw = read_json(self._folder / "config.json", f"{self._folder}: its config.json")
        return eagle3_config(raw, str(self._folder), self._format)

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        read, last = self.states(batch)
        if self._settings.noise:
            read = noise(read, self._settings.noise, rng)
        learnt = flat(batch.learn)
        with torch.no_grad(), self.autocast():
            # Once for all steps, which predict from the same positions.
            target_logits = at(last, learnt).to(self._target_rows.dtype) @ self._target_rows.T
        labels = self._vocabulary.rows(batch.tokens.flatten()[learnt + 1])
        lesson = self._unroll(batch, read)

        def rows_of(here: slice, y: Tensor) -> Rows:
            targets = lesson.targets[here]
            return Rows(target_logits[targets].float(), self._own_logits(y), labels[targets])

        shares = lesson.y.new_tensor(self._weights) / len(learnt)
        weights = shares.repeat_interleave(torch.tensor(lesson.counts, device=shares.device))
        losses = backward_in_slices(lesson.y, rows_of, self._phases.at(done), weights)
        means = [float(part.sum()) / max(len(part), 1) for part in losses.split(lesson.counts)]
        return {
            "loss": float(losses @ weights),
            "covered": float((labels != OUTSIDE).float().mean()),
            **{f"loss {step}": mean for step, mean in enumerate(means, 1)},
        }

    def _unroll(self, batch: Batch, read: Tensor) -> _Lesson:
        """``read`` [B, n, states * hidden]."""
        # The number of each position among the learnt ones, where it is one.
        numbers = (batch.learn.flatten().cumsum(0) - 1).view_as(batch.learn)
        parts, targets = [], []
        with self.autocast():
            chains = Chains(self.head, read[:, :-1])
            for step in range(self._settings.steps):
                y = chains.step(ahead(batch.tokens, step))
                rows = flat(ahead(batch.learn, step))
                parts.append(at(y, rows).float())
                targets.append(ahead(numbers, step).flatten()[rows])
        return _Lesson(torch.cat(parts), torch.cat(targets), [len(part) for part in parts])

    def _own_logits(self, y: Tensor) -> Tensor:
        """[N, hidden] -> float32 [N, k] of the head's tokens."""
        parts = self.head.parts
        with self.autocast():
            if "lm_head" not in parts:
                return self.head.logits(y)
            return parts["lm_head"](parts["norm"](y)).float()

    def export(self, folder: Path) -> None:
        write_head(folder, self._config(), {**self.head.parts.state_dict(), **self._ids})


def build(target: Path, settings: Settings, setup: Setup) -> Eagle3Recipe:
    """A head for the target in a folder, ready to learn; TrainingError if there can be none."""
    check_family(target)
    frozen = Frozen.load(target, setup.device, setup.dtype, kept_bytes(settings))
    return Eagle3Recipe(target, frozen, settings, setup)


def kept_bytes(settings: Settings) -> int:
    """Of hidden states."""
    return int(settings.kept_gb * 1e9)


def work(shape: Shape, settings: Settings) -> Work:
    """See ``training/cost_model.py``."""
    states = len(layer_ids(settings.layers, shape.layers))
    vocab = min(settings.draft_vocabulary, shape.vocab)
    fuse = states * shape.hidden**2
    # Queries, keys and values read an embedding as well.
    layer = shape.layer + shape.hidden * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    output = vocab * shape.hidden if settings.learn_output else 0
    return Work(
        trained=fuse + layer + output,
        multiplied=fuse + settings.steps * layer,
        vocab=vocab,
        losses=settings.steps,
        feature_bytes=2 * (states + 1) * shape.hidden,
        kept=kept_bytes(settings),
    )
