"""An EAGLE head (arXiv 2401.15077): one layer that goes on from the target's last hidden states.

1. *Head.* It starts as the target's last layer, behind an ``fc`` that adds hidden state and
   embedding; the output layer is the target's.
2. *Objective.* At every position the divergence of the head's distribution from the target's, and
   the smooth L1 distance of its hidden state to the target's, which the next level of a tree starts
   from. Noise on the states that are read makes up for theirs being right.

The result is read by ``{"method": "eagle_tree"}``, by ``rasd`` and by vLLM's own ``eagle``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from vllm_specplus.files import read_json
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.batch import Batch
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.export import eagle_config, write_head
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.heads import HeadRecipe, at, check_family, flat, last_layer, load_head
from vllm_specplus.training.losses import Rows, loss_of
from vllm_specplus.training.mixers import noise
from vllm_specplus.training.recipe import Defaults, Setup
from vllm_specplus.training.slices import backward_in_slices
from vllm_specplus.training.steps import Chains, ahead

SUMMARY = "an EAGLE head, served by eagle_tree and rasd, and by vLLM's eagle"
DEFAULTS = Defaults(tokens=200_000, epochs=4, batch_tokens=2048, learning_rate=1e-3)


class Settings(StrictModel):
    """Keys of ``--set``."""

    loss: str | dict[str, float] = Field({"forward_kl": 1.0, "smooth_l1": 1.0})
    """A loss of ``training/losses.py``, or weights of some. The authors' are
    {"smooth_l1": 1.0, "soft_ce": 0.1}."""
    noise: float = 0.1
    """Uniform noise, up to so much, on the target's states."""


def start_weights(target: Frozen) -> dict[str, torch.Tensor]:
    """Weights of a head that begins as the target's last layer, of the sum of embedding and hidden
    state. The first norm has no place in it, nor have biases and norms that Llama has not got."""
    eye = torch.eye(target.hidden_size)
    names = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    names += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    names += ["post_attention_layernorm.weight"]
    given = last_layer(target)
    weights = {f"layer.{name}": given[f"layer.{name}"].float() for name in names}
    return weights | {"fc.weight": torch.cat((eye, eye), 1)}


class EagleRecipe(HeadRecipe):
    """See the module."""

    name = "eagle"

    def __init__(self, folder: Path, target: Frozen, settings: Settings, setup: Setup):
        self._config = eagle_config(read_json(folder / "config.json", f"{folder}: its config.json"))
        self._noise, self._loss = settings.noise, loss_of(settings.loss)
        super().__init__(load_head(self._config, start_weights(target), target), target, (), setup)

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        _, last = self.states(batch)
        read = noise(last, self._noise, rng)
        with self.autocast():
            every = Chains(self.head, read[:, :-1]).step(batch.tokens[:, 1:])
            rows = flat(ahead(batch.learn, 0))
            y, targets = at(every, rows).float(), at(last[:, 1:], rows)
        labels = ahead(batch.tokens, 1).flatten()[rows]

        def rows_of(here: slice, own: torch.Tensor) -> Rows:
            features = targets[here]
            return Rows(
                self.target.output(features), self.head.logits(own), labels[here], features, own
            )

        count = int(batch.learn.sum())
        weights = y.new_full((len(y),), 1 / count)
        losses = backward_in_slices(y, rows_of, self._loss, weights)
        return {"loss": float(losses.sum()) / count}

    def export(self, folder: Path) -> None:
        write_head(folder, self._config, self.head.parts.state_dict())


def build(target: Path, settings: Settings, setup: Setup) -> EagleRecipe:
    """A head for the target in a folder, ready to learn; TrainingError if there can be none."""
    check_family(target)
    return EagleRecipe(target, Frozen.load(target, setup.device, setup.dtype), settings, setup)


def work(shape: Shape, settings: Settings) -> Work:
    """See ``training/cost_model.py``."""
    trained = 2 * shape.hidden**2 + shape.layer
    return Work(
        trained=trained,
        multiplied=trained,
        vocab=shape.vocab,
        feature_bytes=2 * shape.hidden,
    )
