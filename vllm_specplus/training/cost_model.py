"""What a run costs, before it is started: memory, disk and time."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch
from rich.table import Table

from vllm_specplus.planning import sizes
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import KEPT


class Shape(sizes.Shape):
    """The sizes of a target, from its configuration."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The sizes in the config.json of a model's folder; TrainingError if they are not there."""
        try:
            return super().of(folder)
        except ValueError as error:
            raise TrainingError(f"{error}; name the folder of a model") from None


@dataclass(frozen=True)
class Work:
    """What a recipe keeps and computes."""

    trained: int
    """Parameters that the optimiser changes."""
    multiplied: float
    """Trained weights that one position is multiplied with in a forward pass: more than ``trained``
    where weights are used several times (multi-step), less where rows are looked up."""
    vocab: int
    """Logits per position of a loss, of draft and target; 0 without."""
    losses: float = 1.0
    """Losses per position: exits, steps."""
    target_layers: int = 0
    """Of the target, run forward (without gradient) at each position in each epoch; 0 if its
    features are kept."""
    feature_bytes: int = 0
    """Kept per position for the whole run."""
    kept: int = KEPT
    """Most bytes of features that are kept in all."""
    draft_written: float = 0.0
    """Share of the learnt tokens that the draft writes anew in each epoch."""


#: Of a training step, the share of a machine's FLOP/s that is reached; and of writing with many
#: requests side by side.
TRAINING_SHARE, WRITING_SHARE = 0.35, 0.15
#: Bytes per trained parameter: float32 weight, gradient and the two moments of AdamW.
TRAINED_BYTES = 16
#: Rows of logits that are there at once, and copies of them in float32.
LOGIT_ROWS, LOGIT_COPIES = 128, 5
#: Checkpoints on disk while another one is written; bytes of each per trained parameter.
CHECKPOINTS, CHECKPOINT_BYTES = 3, 12
#: Bytes of a token in a file of texts.
TEXT_BYTES = 8
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What a run has."""

    memory: int
    """Bytes that are free where the model will be: of the GPU, or of the machine."""
    disk: int
    """Bytes that are free where the run writes."""
    flops: float
    """FLOP/s of one device in matrix products."""
    devices: int = 1
    own_memory: bool = False
    """Whether the device's memory is apart from the machine's, where features are kept."""


def this_machine(
    out: Path, device: torch.device, dtype: torch.dtype, flops: float | None, devices: int
) -> Machine:
    """What is free here now; ``flops`` is measured (a second) where it is not stated."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        memory = psutil.virtual_memory().available
    there = next(each for each in (out.resolve(), *out.resolve().parents) if each.exists())
    speed = flops or measured_flops(device, dtype)
    apart = device.type == "cuda"
    return Machine(memory, shutil.disk_usage(there).free, speed, devices, apart)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of matrices, the best of some."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        # What is read back has been computed.
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True)
class Cost:
    """What a run needs; the parts by what they are for."""

    memory: dict[str, float]
    """Bytes, on each device."""
    disk: dict[str, float]
    """Bytes."""
    seconds: dict[str, float]


def cost(
    shape: Shape, work: Work, machine: Machine, *, tokens: int, written: int, epochs: int,
    batch_tokens: int, width: int,
) -> Cost:  # fmt: skip
    """What ``epochs`` over texts of ``tokens`` positions cost, ``written`` of which the target has
    to write first; ``width`` are the bytes of a number in products."""
    layers = work.multiplied / shape.layer
    features = work.feature_bytes * tokens
    kept = min(1.0, work.kept / features) if features else 0.0
    per_rank = batch_tokens / machine.devices
    activations = per_rank * layers * width * (10 * shape.hidden + 4 * shape.intermediate)
    memory = {
        "target": shape.parameters * width,
        "trained weights and optimiser": work.trained * TRAINED_BYTES,
        "activations": activations + per_rank * 8 * shape.hidden * width,
        "logits": LOGIT_ROWS * max(work.vocab, shape.vocab) * 4 * LOGIT_COPIES,
    }
    if not machine.own_memory:
        memory["features"] = features * kept
    disk = {
        "texts": tokens * TEXT_BYTES,
        "checkpoints": work.trained * CHECKPOINT_BYTES * CHECKPOINTS,
        "result": work.trained * 4,
    }
    output = shape.hidden * work.vocab
    whole = 2 * shape.layers * shape.layer
    once = kept * whole
    # What is not kept, or of texts that are new, is computed again.
    again = max(2 * work.target_layers * shape.layer, (1 - kept) * whole)
    # The target's logits once, the draft's forward and backward for each loss.
    each_epoch = 6 * work.multiplied + (2 + 4 * work.losses) * output + again
    by_draft = 2 * (work.multiplied + output) * work.draft_written
    speed = machine.flops * machine.devices
    seconds = {
        "the target writes": 2 * shape.parameters * written / (machine.flops * WRITING_SHARE),
        "the draft writes": by_draft * tokens * epochs / (machine.flops * WRITING_SHARE),
        "training": tokens * (once + each_epoch * epochs) / (speed * TRAINING_SHARE),
    }
    return Cost(memory, disk, {name: value for name, value in seconds.items() if value})


def shortage(cost: Cost, machine: Machine) -> str | None:
    """A sentence that says what is not there, None if all is."""
    for name, needed, free, hint in (
        ("memory", cost.memory, machine.memory, "lower --batch-tokens, or use a larger machine"),
        ("disk", cost.disk, machine.disk, "make room, or name another --out"),
    ):
        if (total := sum(needed.values())) > free:
            needed, there = f"{total / GIB:.1f} GiB of {name}", f"{free / GIB:.1f} GiB"
            return f"the run needs {needed}, and {there} are free: {hint}"
    return None


def table(cost: Cost, machine: Machine) -> Table:
    """The cost as the user sees it."""
    shown = Table("", "needed", "available", box=None)
    for title, parts, free in (
        ("memory", cost.memory, machine.memory), ("disk", cost.disk, machine.disk)
    ):  # fmt: skip
        shown.add_row(title, f"{sum(parts.values()) / GIB:.2f} GiB", f"{free / GIB:.2f} GiB")
        for name, size in parts.items():
            shown.add_row(f"  {name}", f"{size / GIB:.2f}", "")
    speed = f"{machine.devices} x {machine.flops / 1e12:.2f} TFLOP/s"
    shown.add_row("time", f"about {spoken(sum(cost.seconds.values()))}", speed)
    for name, seconds in cost.seconds.items():
        shown.add_row(f"  {name}", spoken(seconds), "")
    return shown


def spoken(seconds: float) -> str:
    """A time as minutes or hours."""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
