"""``router``: who decides where a target writes a draft's step anew (Arbitrage, arXiv 2512.05033,
section 4.2).

A decoder with two outputs at its last token, fine-tuned as a whole by cross-entropy. It learns from
steps that both models wrote behind the same text (``python -m vllm_specplus.arbitrage.labels``);
a step's label is whether the target's was the better one. The commoner label is sampled down to the
rarer, anew in every epoch (the authors do it once).

``--target`` is what it starts from: any causal model, or a classifier of two labels, as a process
reward model is. The authors take one of 1.5 billion weights, 3 epochs at 1e-5 in batches of 1,024
texts; the defaults are for small ones. It writes a folder of transformers that ``vllm serve
--runner pooling`` and ``vllm-specplus arbitrate`` read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.strict import MOST_QUOTED, StrictModel, quoted
from vllm_specplus.training.batch import Batch, Batches
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.language_model import read_model_config
from vllm_specplus.training.measure import BATCH_TOKENS, Measured
from vllm_specplus.training.model_folder import own_dtype, write_model
from vllm_specplus.training.recipe import Defaults, OfModule, Setup
from vllm_specplus.training.texts import Text

SUMMARY = "who decides which steps of a draft a target writes anew; served by arbitrate"
DEFAULTS = Defaults(epochs=3, batch_tokens=4096, learning_rate=3e-4)

#: What the two labels mean, as the result's configuration says it.
LABELS = {0: "draft", 1: "target"}


class Settings(StrictModel):
    """Keys of ``--set`` for ``router``."""

    learn: Literal["all", "head"] = "all"
    """All weights, as in the paper, or the two outputs alone."""
    balance: bool = True
    """Are there as many texts of both labels in an epoch?"""


class Router(OfModule):
    """A classifier of the last token."""

    name = "router"

    def __init__(self, model: nn.Module, folder: Path, settings: Settings, setup: Setup):
        """``model``: transformers', for sequence classification, with two labels."""
        self._model, self._folder, self._settings = model, folder, settings
        self._dtype, self._seed = setup.dtype, setup.seed
        model.requires_grad_(settings.learn == "all")
        model.score.requires_grad_(True)

    @property
    def module(self) -> nn.Module:
        return self._model

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        logits, known = self._judged(batch)
        errors = F.cross_entropy(logits, known, reduction="sum")
        # By positions, as ranks and batches are weighted.
        loss = errors / batch.learn.sum().clamp(min=1)
        loss.backward()
        told = (logits.argmax(-1) == known).float().mean() if len(known) else torch.tensor(0.0)
        return {"loss": float(loss.detach()), "told": float(told)}

    def texts_for(self, epoch: int, texts: Sequence[Text]) -> list[Text] | None:
        if not self._settings.balance:
            return None
        kinds: tuple[list[Text], list[Text]] = ([], [])
        for text in texts:
            kinds[text.labels[-1]].append(text)
        rng = torch.Generator().manual_seed((self._seed << 20) + epoch)
        rarer, commoner = sorted(kinds, key=len)
        chosen = torch.randperm(len(commoner), generator=rng)[: len(rarer)]
        return rarer + [commoner[i] for i in sorted(chosen.tolist())]

    @torch.no_grad()
    def measure(self, texts: list[Text]) -> Measured:
        """No acceptance, but the share of each label that a threshold of 0.5 tells, and how often a
        step to be escalated has a higher score than one to be kept."""
        device = self._model.score.weight.device
        found = [
            self._judged(batch.to(device)) for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0)
        ]
        scores = torch.cat([logits[:, 1] - logits[:, 0] for logits, _ in found])
        known = torch.cat([known for _, known in found])
        kept, escalated = scores[known == 0], scores[known == 1]
        figures = {}
        if len(kept):
            figures["kept_told"] = float((kept <= 0).float().mean())
        if len(escalated):
            figures["escalated_told"] = float((escalated > 0).float().mean())
        if len(kept) and len(escalated):
            above = (escalated[:, None] > kept).float() + 0.5 * (escalated[:, None] == kept)
            figures["ranked_right"] = float(above.mean())
        return Measured(len(known), None, None, (), figures)

    def export(self, folder: Path) -> None:
        write_model(self._model, folder, self._folder, own_dtype(self._folder))

    def _judged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits float32 [N, 2] at the tokens of which something is known, and their labels [N]."""
        device = self._model.score.weight.device
        with torch.autocast(device.type, torch.bfloat16, self._dtype == torch.bfloat16):
            states = self._model.base_model(
                input_ids=batch.tokens, attention_mask=batch.mask.long(), use_cache=False
            ).last_hidden_state
        there = batch.labels >= 0
        return self._model.score(states[there].float()).float(), batch.labels[there]


def build(target: Path, settings: Settings, setup: Setup) -> Router:
    """Reads what it starts from, and looks at the labels."""
    silent = sum(not text.labels or text.labels[-1] < 0 for text in setup.texts)
    if silent:
        raise TrainingError(
            f"router learns from steps of two models, and {silent} of {len(setup.texts)} texts "
            f"have no label at their end: bring rows of python -m vllm_specplus.arbitrage.labels "
            f"with --data, and raise --max-length if they are longer"
        )
    if len({text.labels[-1] for text in setup.texts}) < 2:
        raise TrainingError(
            "the steps of router have all the same label, one model is always the better one: "
            "bring others with --data"
        )
    return Router(load(target, setup.device), target, settings, setup)


def load(folder: Path, device: torch.device) -> nn.Module:
    """The classifier of a folder; of a model that is none, with outputs that say nothing yet."""
    from transformers import AutoModelForSequenceClassification

    config = read_model_config(folder, "target")
    wanted: dict[str, Any] = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, ignore_mismatched_sizes=True, **wanted,
        )  # fmt: skip
    except Exception as error:  # of transformers, safetensors or the file system
        reason = (str(error).splitlines() or [""])[0][:MOST_QUOTED]
        raise TrainingError(
            f"target {quoted(folder)} cannot be a classifier ({reason}): name another decoder"
        ) from None
    two = len(config.get("id2label") or LABELS) == 2  # two need not be named
    classifies = any("SequenceClassification" in name for name in config.get("architectures") or ())
    if not (two and classifies):
        nn.init.zeros_(model.score.weight)
    return model.eval().to(device)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs; see ``training/cost_model.py``."""
    outputs = 2 * shape.hidden
    if settings.learn == "head":
        return Work(
            trained=outputs, multiplied=outputs, vocab=0, losses=0.0, target_layers=shape.layers
        )
    trained = shape.layers * shape.layer + shape.embedding
    return Work(
        trained=trained + outputs, multiplied=shape.layers * shape.layer, vocab=0, losses=0.0,
        kept=0,
    )  # fmt: skip
