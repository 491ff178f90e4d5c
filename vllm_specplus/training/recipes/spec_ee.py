"""``spec_ee``: predictors that say where the target may be left (SpecEE, arXiv 2504.08850).

The target and a draft stay as they are. At every position of texts that the target wrote the draft
names its ``candidates`` most probable tokens; behind every layer but the last the target's own
norm and output layer give their logits, of which a predictor of that layer reads what it does when
served (``drafting/exit_predictors.py``). Its label: is the best of the candidates there what the
whole target says? The whole output layer, which serving asks as well before a row exits, is not
asked here: of every layer it would take most of the time. Half of the positions learn with some of
the candidates only, as rows of a tree have them.

Where predictors would have let rows exit is counted on the way; the ``static`` layers with most
exits are the offline level of their schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.drafting.exit_predictors import (
    HIDDEN,
    HIDDEN_BIAS,
    LAYERS,
    OUT,
    OUT_BIAS,
    STATIC,
    features,
    scores,
)
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.batch import Batch, Batches
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.language_model import load_model
from vllm_specplus.training.measure import BATCH_TOKENS, Measured
from vllm_specplus.training.recipe import Defaults, Setup
from vllm_specplus.training.slices import slices
from vllm_specplus.training.texts import Text

SUMMARY = "predictors that leave the target early; served by the lossy method spec_ee"
DEFAULTS = Defaults(tokens=50_000, epochs=2, batch_tokens=2048, learning_rate=1e-3)

#: Share of positions that learn with fewer candidates.
PARTIAL = 0.5
#: Memory of the exits, per step; and the name under which they are kept.
MEMORY, EXITS = 0.99, "exits"


class Settings(StrictModel):
    """Keys of ``--set`` for ``spec_ee``."""

    draft: str | None = None
    """Folder of the draft model that names the candidates, of the target's tokenizer; it has to be
    named."""
    candidates: int = Field(default=4, ge=2, le=16)
    """Tokens that it names."""
    inner: int = Field(default=512, ge=1, le=8192)
    """Units of a predictor's hidden layer."""
    static: int = Field(default=8, ge=1, le=256)
    """Layers of the offline level."""


class SpecEeRecipe:
    """The predictors in training, the draft and the target."""

    name = "spec_ee"

    def __init__(self, target: Frozen, draft: Frozen, settings: Settings, seed: int):
        self.target, self.draft, self._settings = target, draft, settings
        self.layers = list(range(1, len(target.layers)))
        """Behind how many layers there is a predictor."""
        read, inner = 3 * settings.candidates, settings.inner
        rng, count = torch.Generator().manual_seed(seed), len(self.layers)
        start = {
            HIDDEN: torch.randn(count, inner, read, generator=rng) * (2 / read) ** 0.5,
            HIDDEN_BIAS: torch.zeros(count, inner),
            OUT: torch.randn(count, inner, generator=rng) * inner**-0.5,
            OUT_BIAS: torch.zeros(count),
        }
        self.weights = {name: nn.Parameter(each.to(target.device)) for name, each in start.items()}
        self._exits = torch.zeros(count, device=target.device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def state(self) -> dict[str, Tensor]:
        own = {name: each.detach() for name, each in self.weights.items()}
        return own | {EXITS: self._exits}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, each in self.state().items():
            each.copy_(state[name])

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        count = max(int(batch.learn.sum()), 1)
        loss, right = 0.0, 0.0
        exits = torch.zeros_like(self._exits)
        for read, labels in self._read(batch, rng):
            odds = scores(self.weights, slice(None), read)
            errors = F.binary_cross_entropy_with_logits(odds, labels.float(), reduction="sum")
            errors = errors / (count * len(self.layers))
            errors.backward()
            loss += float(errors.detach())
            right += float(((odds > 0) == labels).float().mean(0).sum())
            exits += _first_exits(odds.detach() > 0)
        self._exits.mul_(MEMORY).add_(exits)
        return {"loss": loss, "told": right / count}

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    @torch.no_grad()
    def measure(self, texts: list[Text]) -> Measured:
        """Of all positions: how many would exit, after what share of the layers, and how many of
        the exits say what the whole target does; with all predictors asked."""
        count = exited = right = 0
        layers = 0.0
        for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0):
            for read, labels in self._read(batch.to(self.target.device)):
                fires = scores(self.weights, slice(None), read) > 0
                first = fires.float().argmax(0)  # of none: 0
                out = fires.any(0)
                here = torch.arange(len(out), device=out.device)
                exited += int(out.sum())
                right += int((labels[first, here] & out).sum())
                depth = torch.tensor(self.layers, device=out.device)[first]
                layers += float(torch.where(out, depth, len(self.layers) + 1).sum())
                count += len(out)
        return Measured(count, None, None, (), {
            "exits": exited / max(count, 1), "exits_right": right / max(exited, 1),
            "layers_run": layers / max(count, 1) / (len(self.layers) + 1),
        })  # fmt: skip

    def export(self, folder: Path) -> None:
        best = self._exits.topk(min(self._settings.static, len(self.layers))).indices.cpu()
        static = torch.tensor(self.layers)[best].sort().values
        tensors = {name: each.detach().cpu().clone() for name, each in self.weights.items()}
        tensors |= {LAYERS: torch.tensor(self.layers), STATIC: static}
        save_file(tensors, folder / "predictors.safetensors")

    @torch.no_grad()
    def _read(
        self, batch: Batch, rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """By slices of the positions that are learnt from: what all predictors read, float32
        [P, n, 3 k], and their labels bool [P, n]. ``rng``: takes some candidates away."""
        states = self.target.states(batch, self.layers)
        last, entering = states.last[batch.learn], states.layers[batch.learn]
        drafted = self.draft.read(batch.tokens, batch.mask)[batch.learn]
        for here in slices(len(last)):
            ids = self.draft.output(drafted[here]).topk(self._settings.candidates, -1).indices
            missing = self._missing(ids, rng)
            said = self.target.output(last[here]).argmax(-1)
            weights = self.target.output_weight[ids].float()
            before, read, labels = None, [], []
            for hidden in entering[here].chunk(len(self.layers), -1):
                normed = self.target.body.norm(hidden).float()
                logits = (weights @ normed.unsqueeze(-1)).squeeze(-1)
                row, before = features(logits, missing, before)
                read.append(row)
                there = logits.masked_fill(missing, float("-inf"))
                best = ids.gather(1, there.argmax(-1, keepdim=True))[:, 0]
                labels.append(best == said)
            yield torch.stack(read), torch.stack(labels)

    def _missing(self, ids: Tensor, rng: torch.Generator | None) -> Tensor:
        """Bool [n, k]: which of the candidates a row is to do without, as rows of a tree do."""
        rows, count = ids.shape
        if rng is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        left = torch.randint(1, count + 1, (rows, 1), generator=rng, device=ids.device)
        whole = torch.rand(rows, 1, generator=rng, device=ids.device) > PARTIAL
        return (torch.arange(count, device=ids.device) >= left) & ~whole


def _first_exits(fires: Tensor) -> Tensor:
    """How many positions exit first behind each layer, float32 [P], of ``fires`` bool [P, n]."""
    first = fires & (fires.long().cumsum(0) == 1)
    return first.float().sum(1)


def build(target: Path, settings: Settings, setup: Setup) -> SpecEeRecipe:
    """Reads the target and the draft."""
    if settings.draft is None:
        raise TrainingError(
            "spec_ee learns from the tokens that a draft names: name its folder by --set draft=DIR"
        )
    frozen = Frozen.load(target, setup.device, setup.dtype)
    if len(frozen.layers) < 2:
        raise TrainingError(
            "the target has one layer, which it cannot be left before: take a deeper one"
        )
    model = load_model(Path(settings.draft), "draft", setup.dtype, setup.device)
    draft = Frozen(model, setup.dtype)
    if draft.vocab_size != frozen.vocab_size:
        raise TrainingError(
            f"the draft has {draft.vocab_size} token ids, and the target {frozen.vocab_size}: "
            f"spec_ee is for a draft of the target's tokens"
        )
    return SpecEeRecipe(frozen, draft, settings, setup.seed)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs, with a draft as wide as the target; see ``training/cost_model.py``."""
    predictors = shape.layers - 1
    trained = predictors * (settings.inner * (3 * settings.candidates + 2) + 1)
    return Work(
        trained=trained, multiplied=trained, vocab=shape.vocab, losses=1.0,
        feature_bytes=2 * shape.hidden * shape.layers,
    )  # fmt: skip
