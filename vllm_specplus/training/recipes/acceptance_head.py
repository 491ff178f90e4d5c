"""``acceptance_head``: SpecDec++'s head, which tells whether the target will accept a drafted token
(arXiv 2405.19715, section 3.3).

The draft stays as it is. At every position of texts that the target wrote it draws a token Y, whose
label is how probable its acceptance would be, ``min(1, p(Y) / q(Y))``. What the draft then reads
are these draws in the text's place, but for a share ``keep_share`` of positions with the text's own
token, at which nothing is learnt: a drafted token is rated behind tokens that were drafted too. The
loss is the cross entropy of the head's probability with the label, in which rejections count
``reject_weight`` times, divided by the weights.

No library trains this head; the authors' code trains it inside a copy of transformers' trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_specplus.drafting.acceptance_head import BLOCK, OUT, logits
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

SUMMARY = "a head that ends drafts where a rejection is probable; served by draft_tree's stop"
DEFAULTS = Defaults(tokens=200_000, epochs=3, batch_tokens=2048, learning_rate=1e-3)


class Settings(StrictModel):
    """Keys of ``--set`` for ``acceptance_head``."""

    draft: str | None = None
    """Folder of the draft model, of the target's tokenizer; it has to be named."""
    blocks: int = Field(default=3, ge=0, le=16)
    """Residual blocks of the head."""
    keep_share: float = Field(default=0.15, ge=0, lt=1)
    """Share of positions at which the draft reads the text's token instead of its own."""
    reject_weight: float = Field(default=6.0, gt=0)
    """How much a rejection counts beside an acceptance."""


class AcceptanceHeadRecipe:
    """The head in training, its draft and the target."""

    name = "acceptance_head"

    def __init__(self, target: Frozen, draft: Frozen, settings: Settings, seed: int):
        self.target, self.draft, self._settings = target, draft, settings
        size, device = draft.hidden_size, draft.device
        rng = torch.Generator().manual_seed(seed)
        self.weights: dict[str, nn.Parameter] = {}
        for number in range(settings.blocks):
            # At first a block adds nothing.
            self._add(BLOCK.format(number, "weight"), torch.zeros(size, size), device)
            self._add(BLOCK.format(number, "bias"), torch.zeros(size), device)
        first = torch.randn(2, size, generator=rng) * size**-0.5 * 0.1
        self._add(OUT.format("weight"), first, device)
        self._add(OUT.format("bias"), torch.zeros(2), device)

    def _add(self, name: str, value: Tensor, device: torch.device) -> None:
        self.weights[name] = nn.Parameter(value.to(device))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def state(self) -> dict[str, Tensor]:
        return {name: each.detach() for name, each in self.weights.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(state[name])

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        hidden, labels = self._drawn(batch, rng)
        loss = weighted_loss(self.weights, hidden, labels, self._settings.reject_weight)
        if len(labels):
            loss.backward()
        return {"loss": float(loss.detach()), "acceptance": _mean(labels)}

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    @torch.no_grad()
    def measure(self, texts: list[Text]) -> Measured:
        """The loss beside that of the best constant, and how much of the accepted and of the
        rejected mass a threshold of 0.5 tells."""
        rng = torch.Generator(self.draft.device).manual_seed(0)
        found = [
            self._drawn(batch.to(self.draft.device), rng)
            for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0)
        ]
        if not found:
            return Measured(0, None, None, ())
        hidden, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        heavy = self._settings.reject_weight
        told = logits(self.weights, hidden).softmax(-1)[:, 1] > 0.5
        # The constant with the least loss is the weighted share.
        constant = labels.sum() / (labels + heavy * (1 - labels)).sum()
        odds = torch.stack(((1 - constant).log(), constant.log())).expand(len(labels), 2)
        others = {
            "loss": float(weighted_loss(self.weights, hidden, labels, heavy)),
            "constant_loss": float(_cross_entropy(odds, labels, heavy)),
            "accepted_told": float((told * labels).sum() / labels.sum().clamp(min=1e-9)),
            "rejected_told": float((~told * (1 - labels)).sum() / (1 - labels).sum()),
            "acceptance": _mean(labels),
        }
        return Measured(len(labels), None, None, (), others)

    def export(self, folder: Path) -> None:
        save_file(
            {name: each.cpu().clone() for name, each in self.state().items()},
            folder / "head.safetensors",
        )

    @torch.no_grad()
    def _drawn(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hidden states float32 [N, hidden] of the draft at the tokens it drew, and their labels
        float32 [N]."""
        learn = batch.learn[:, :-1]  # of the prediction of the token behind
        p_states = self.target.states(batch).last[:, :-1][learn]
        q_states = self.draft.read(batch.tokens, batch.mask)[:, :-1][learn]
        drawn = torch.zeros(len(p_states), dtype=torch.long, device=p_states.device)
        labels = torch.zeros(len(p_states), device=p_states.device)
        for here in slices(len(p_states)):
            q = self.draft.output(q_states[here]).softmax(-1)
            p = self.target.output(p_states[here]).softmax(-1)
            token = torch.multinomial(q, 1, generator=rng)
            drawn[here] = token[:, 0]
            labels[here] = (p.gather(1, token) / q.gather(1, token)).clamp(max=1)[:, 0]
        kept = torch.rand(len(drawn), generator=rng, device=drawn.device)
        kept = kept < self._settings.keep_share
        tokens = batch.tokens.clone()
        own = tokens[:, 1:][learn]
        tokens[:, 1:][learn] = torch.where(kept, own, drawn)
        hidden = self.draft.read(tokens, batch.mask)[:, 1:][learn]
        return hidden[~kept].float(), labels[~kept]


def _cross_entropy(odds: Tensor, labels: Tensor, heavy: float) -> Tensor:
    rejected, accepted = odds.log_softmax(-1).unbind(-1)
    sums = -(labels * accepted + heavy * (1 - labels) * rejected).sum()
    return sums / (labels + heavy * (1 - labels)).sum().clamp(min=1e-9)


def weighted_loss(
    weights: Mapping[str, Tensor], hidden: Tensor, labels: Tensor, heavy: float
) -> Tensor:
    """The loss of a head with ``weights`` at ``hidden`` float32 [N, hidden], whose ``labels``
    float32 [N] are probabilities of acceptance; rejections count ``heavy`` times."""
    return _cross_entropy(logits(weights, hidden), labels, heavy)


def _mean(labels: Tensor) -> float:
    return float(labels.mean()) if len(labels) else 0.0


def build(target: Path, settings: Settings, setup: Setup) -> AcceptanceHeadRecipe:
    """Reads the target and the draft."""
    if settings.draft is None:
        raise TrainingError(
            "acceptance_head learns what a draft does: name its folder by --set draft=DIR"
        )
    frozen = Frozen.load(target, setup.device, setup.dtype)
    model = load_model(Path(settings.draft), "draft", setup.dtype, setup.device)
    draft = Frozen(model, setup.dtype)
    if draft.vocab_size != frozen.vocab_size:
        raise TrainingError(
            f"the draft has {draft.vocab_size} token ids, and the target {frozen.vocab_size}: "
            f"acceptance_head is for a draft of the target's tokens"
        )
    return AcceptanceHeadRecipe(frozen, draft, settings, setup.seed)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs, with a draft as wide as the target; see ``training/cost_model.py``."""
    trained = settings.blocks * (shape.hidden + 1) * shape.hidden + 2 * (shape.hidden + 1)
    return Work(
        trained=trained, multiplied=trained, vocab=shape.vocab, losses=1.0,
        feature_bytes=2 * shape.hidden,
    )  # fmt: skip
