"""Checkpoints: folders ``checkpoint/STEP`` that appear when they are whole; two are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import write_folder

GENERATIONS = 2
STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    epoch: int = 0
    batch: int = 0
    """Of the epoch, the next one."""
    step: int = 0
    """Steps that were made."""
    seconds: float = 0.0
    """Time that they took."""


class Checkpoints:
    """The checkpoints of a run, in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, progress: Progress, state: dict[str, Tensor]) -> None:
        """Writes one, and removes those that are too old; TrainingError if it cannot be written:
        the one before is still there then."""

        def fill(new: Path) -> None:
            save_file({name: plain(tensor) for name, tensor in state.items()}, new / STATE)
            (new / PROGRESS).write_text(json.dumps(asdict(progress)))

        target = self._folder / f"{progress.step:09d}"
        write_folder(target, fill)
        for old in self._found()[GENERATIONS:]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The newest that can be read, None if there is none; TrainingError if there are some, and
        all are damaged."""
        found = self._found()
        for folder in found:
            try:
                progress = Progress(**json.loads((folder / PROGRESS).read_text()))
                return progress, load_file(folder / STATE)
            except (OSError, ValueError, TypeError, SafetensorError):
                continue
        if found:
            raise TrainingError(
                f"no checkpoint in {self._folder} can be read: remove the folder to train from the "
                f"start"
            )
        return None

    def _found(self) -> list[Path]:
        """Newest first."""
        names = self._folder.glob("[0-9]*") if self._folder.is_dir() else ()
        return sorted((each for each in names if each.name.isdecimal()), reverse=True)


def plain(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``optimiser.INDEX.NAME`` of all that the optimiser remembers of its parameters."""
    return {
        f"optimiser.{index}.{name}": value
        for index, of_one in optimiser.state_dict()["state"].items()
        for name, value in of_one.items()
    }


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Takes up what :func:`optimiser_state` has found, among other things."""
    of_all: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            of_all.setdefault(int(index), {})[key] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": of_all, "param_groups": groups})
