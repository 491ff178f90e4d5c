"""Drafting methods and placements as rounds: what is drafted, how long it takes, how it is judged.

A round drafts ``levels`` levels and verifies every node and the newest token in one pass. A method
costs passes of something; where a draft may run is a choice of its own (:data:`PLACEMENTS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_specplus.planning.passes import WIDTH, Load, Machine, Time
from vllm_specplus.planning.sizes import Shape
from vllm_specplus.planning.software import LAUNCH

#: Seconds in which drafts are looked up on the host, per request (``step_counts.json``).
LOOK_UP = 1e-4
#: Ids that the published EAGLE-3 heads draft from.
EAGLE3_VOCABULARY = 32000


@dataclass(frozen=True)
class Round:
    """One round of drafting and verifying."""

    draft: Time
    verify: Time

    @property
    def time(self) -> Time:
        return self.draft + self.verify

    @property
    def seconds(self) -> float:
        return self.time.total


def step(machine: Machine, target: Shape, load: Load, ranks: int) -> Time:
    """A step without speculation."""
    return machine.forward(target, load, ranks) + Time(host=machine.software.step)


def verified(machine: Machine, target: Shape, load: Load, nodes: float, ranks: int) -> Time:
    """A step that verifies ``nodes`` drafted rows of each request of ``load``."""
    rows = load.requests * (1 + nodes)
    judging = Time(host=machine.software.round_launches * LAUNCH)
    return step(machine, target, replace(load, rows=rows), ranks) + judging


# -- a draft model, by where it runs ------------------------------------------


def one_device(machine: Machine, draft: Shape, load: Load, devices: int, levels: int) -> Time:
    """All of it on one device; the others wait."""
    return machine.forward(draft, load, 1, draft=True) * levels


def tensor_parallel(machine: Machine, draft: Shape, load: Load, devices: int, levels: int) -> Time:
    """Every layer on all devices, as vLLM's own draft models."""
    return machine.forward(draft, load, devices, draft=True) * levels


def layer_parallel(machine: Machine, draft: Shape, load: Load, devices: int, levels: int) -> Time:
    """EasySpec, variant A: attentions of a group side by side, all else on one device."""
    first = exact_pass(machine, draft, load, devices, split=False)
    return first + fuzzy_pass(machine, draft, load, devices, split=False) * (levels - 1)


def layer_parallel_split(
    machine: Machine, draft: Shape, load: Load, devices: int, levels: int
) -> Time:
    """EasySpec, variant B: the same, MLPs and output layer divided among the devices."""
    first = exact_pass(machine, draft, load, devices, split=True)
    return first + fuzzy_pass(machine, draft, load, devices, split=True) * (levels - 1)


Placement = Callable[[Machine, Shape, Load, int, int], Time]
PLACEMENTS: dict[str, Placement] = {
    "one device": one_device,
    "tensor parallel": tensor_parallel,
    "EasySpec A": layer_parallel,
    "EasySpec B": layer_parallel_split,
}


def messages(layers: int, devices: int, split: bool) -> dict[str, dict[str, int]]:
    """How many messages of which kind a fuzzy and an exact pass of EasySpec has, with groups of
    ``devices`` layers; without ``split`` as ``drafting.shards.messages`` says, whose two broadcasts
    describe the rows."""
    if devices == 1:
        return {"fuzzy": {}, "exact": {}}
    groups, rest = divmod(layers - 2, devices)
    if not split:
        # The first layer of a group is at home, and may be all of the last group.
        apart = groups + (rest > 1)
        elsewhere = groups * (devices - 1) + max(rest - 1, 0)
        return {
            "fuzzy": {"broadcast": 2 + apart, "gather": apart},
            "exact": {"broadcast": 2, "copy": 2 * elsewhere},
        }
    # What is left of a group is everywhere after its last MLP's all-reduce.
    return {
        "fuzzy": {"broadcast": 4, "all-gather": groups + (rest > 0) + 1, "all-reduce": layers},
        "exact": {"broadcast": 2 + layers, "all-gather": 1, "all-reduce": layers},
    }


def fuzzy_pass(machine: Machine, draft: Shape, load: Load, devices: int, split: bool) -> Time:
    """A pass whose attentions of a group, of ``devices`` layers, all read the group's input."""
    groups = math.ceil((draft.layers - 2) / devices)
    # The first and the last layer, and one attention of each group, are on the way.
    return _divided_pass(machine, draft, load, devices, split, groups + 2, "fuzzy")


def exact_pass(machine: Machine, draft: Shape, load: Load, devices: int, split: bool) -> Time:
    """A pass layer by layer, which writes the exact keys and values: once per round."""
    return _divided_pass(machine, draft, load, devices, split, draft.layers, "exact")


def _divided_pass(
    machine: Machine, draft: Shape, load: Load, devices: int, split: bool, attentions: int,
    kind: str,
) -> Time:  # fmt: skip
    """``attentions`` one after the other, and every MLP."""
    software, ranks = machine.software, devices if split else 1
    sent = messages(draft.layers, devices, split)[kind]
    size = load.rows * draft.hidden * WIDTH
    time = (
        machine.attention(draft, load) * attentions
        + machine.mlp(draft, load, ranks) * draft.layers
        + machine.head(draft, load, ranks)
    )
    for name, count in sent.items():
        # A gather brings a tensor from each device.
        moved = size * (devices if "gather" in name else 1)
        time += machine.collective(moved, devices, name) * count
    kernels = software.attention_kernels * attentions + software.mlp_kernels * draft.layers
    kernels += software.pass_kernels + (0 if software.graphs else sum(sent.values()))
    return machine.finished(time, kernels, draft=True)


# -- drafts of other kinds ----------------------------------------------------


def eagle_head(target: Shape, third: bool) -> Shape:
    """An EAGLE head: one layer of the target's sizes, behind a projection of two inputs. The third
    version's projections read both inputs, and it has a vocabulary of its own."""
    vocab = min(EAGLE3_VOCABULARY, target.vocab) if third else target.vocab
    return replace(target, layers=1, vocab=vocab, experts=0, dense_layers=0, weight_bits=16)


def head_drafts(
    machine: Machine, target: Shape, load: Load, levels: int, third: bool = True
) -> Time:
    """A head on one device, level by level."""
    head = eagle_head(target, third)
    inputs = 2 * target.hidden * target.hidden
    if third:  # queries, keys and values of twice the width
        inputs = target.hidden * target.head_dim * (target.heads + 2 * target.kv_heads)
    projection = machine.block(WIDTH * inputs, 2 * load.rows * inputs)
    return (machine.forward(head, load, draft=True) + projection) * levels


def medusa_drafts(machine: Machine, target: Shape, load: Load, levels: int) -> Time:
    """A Medusa head of every level, in one pass of the target's last hidden state."""
    weights = target.hidden * target.hidden + target.embedding
    head = machine.block(WIDTH * weights, 2 * load.rows * weights) * levels
    return machine.launched(head, 4 * levels, machine.software.graphs) + Time(
        host=machine.software.draft_launches * LAUNCH
    )


def own_layers(
    machine: Machine, target: Shape, load: Load, ranks: int, share: float, levels: int
) -> Time:
    """Some of the target's own layers, level by level."""
    layers = share * target.layers
    return machine.forward(target, load, ranks, layers=layers, draft=True) * levels


def look_up(load: Load) -> Time:
    """Drafts that the host finds in texts and tables."""
    return Time(host=LOOK_UP * load.requests)
