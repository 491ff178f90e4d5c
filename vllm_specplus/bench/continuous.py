"""``vllm-specplus bench --task image-continuous``: pictures of latents, with and without CSpD.

In this process and without vLLM: what is compared is the method. Every batch size makes the same
classes by the same seeds, in batches of that size, methods in turn; the classifier and the
distances are those of ``--task image``. Methods:

* ``none``: the target alone;
* ``cspd``, with the keys of :class:`~vllm_specplus.image.continuous.generation.Cspd`;
* ``plain:iterations=N``, for masked models: the target alone in so many iterations.

A pass of the target is one call of its backbone per picture.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from vllm_specplus.bench import InputError
from vllm_specplus.bench.images import shown
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.bench.report import ReportHead
from vllm_specplus.bench.runner import Notify
from vllm_specplus.image import quality
from vllm_specplus.image.continuous.decoding import Counts
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.generation import Recipe, Way


class ContinuousRun(BaseModel):
    """One method at one batch size."""

    label: str
    batch: int
    pictures: int
    seconds: float
    passes_per_picture: float
    """Of the target's backbone."""
    acceptance: float | None
    """Share of the judged drafts."""
    acceptance_at: list[float | None]
    """The same at every place in the order in which a picture is drawn; None where nothing was
    judged. Empty without drafts."""
    given_up: int
    """Residuals that ended at the bound of proposals."""
    accuracy: float
    classifier: str
    """The network whose features the distance is of; others' cannot be compared."""
    distance: float
    distance_error: float
    """Bootstrap."""

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / self.seconds


class ContinuousReport(ReportHead):
    """The JSON file."""

    runs: list[ContinuousRun]


class ContinuousBench:
    """Measures methods in turn; ``notify`` is told which, and of pictures that are made."""

    def __init__(
        self, model: str, methods: list[MethodSpec], pictures: int, batches: list[int],
        temperature: float, guidance: float, seed: int, notify: Notify,
    ):  # fmt: skip
        try:
            self.folder = LatentsFolder.load(model)
        except FileNotFoundError as error:
            raise InputError(f"--model: {error}") from None
        if self.folder.classifier is None:
            raise InputError(f"--model: {model} has no classifier/ to judge pictures with")
        if pictures < 2:
            raise InputError("--limit: a distance needs at least 2 pictures")
        if temperature <= 0:
            raise InputError(
                f"--temperature: latents are drawn, it must be above 0, not {temperature}"
            )
        self.model, self.batches, self.notify = model, batches, notify
        self.temperature, self.guidance, self.seed = temperature, guidance, seed
        self.ways = {method.label: self._way(method) for method in methods}
        self.labels = torch.arange(pictures) % self.folder.num_classes
        self.latents: dict[str, torch.Tensor] = {}
        self.seen: dict[str, np.ndarray] = {}
        """Features of the pictures of every method, of the newest batch size."""
        self.runs: list[ContinuousRun] = []

    def _way(self, method: MethodSpec) -> Way:
        keys = dict(method.speculative_config or {})
        keys.pop("method", None)
        if method.name == "cspd":
            keys = {"cspd": keys}
        elif method.name not in (BASELINE, "plain"):
            raise InputError(
                f"--methods: --task image-continuous measures {BASELINE}, cspd and, of masked "
                f"models, plain:iterations=N, not {method.name}"
            )
        try:
            recipe = Recipe(temperature=self.temperature, guidance_scale=self.guidance, **keys)
            return recipe.way(self.folder)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"] if part != "cspd")
            raise InputError(f"--methods: {method.label}: {where}: {problem['msg']}") from None
        except ValueError as error:
            raise InputError(f"--methods: {method.label}: {error}") from None

    def run(self) -> None:
        for batch in self.batches:
            for label, way in self.ways.items():
                self.notify(f"{label}, batches of {batch}", 0)
                way(self.labels[: min(batch, 8)], list(range(min(batch, 8))))  # warm up
                self.runs.append(self._measure(label, way, batch))

    @property
    def total(self) -> int:
        """Pictures to make."""
        return len(self.ways) * sum(map(self._count, self.batches))

    def _count(self, batch: int) -> int:
        """Small batches take longest: fewer pictures of them are made, and judged."""
        return min(len(self.labels), max(batch * 8, 16))

    def _measure(self, label: str, way, batch: int) -> ContinuousRun:
        count = self._count(batch)
        made, passes, given_up, seconds = [], 0.0, 0, 0.0
        judged = accepted = np.zeros(self.folder.length, np.int64)
        for first in range(0, count, batch):
            labels = self.labels[first : min(first + batch, count)]
            seeds = [self.seed + i for i in range(first, first + len(labels))]
            start = time.perf_counter()
            latents, counts = way(labels, seeds)
            seconds += time.perf_counter() - start
            self.notify(None, len(labels))
            made.append(latents)
            if isinstance(counts, Counts):
                passes += float(counts.target_passes.sum())
                judged = judged + counts.judged_at.numpy()
                accepted = accepted + counts.accepted_at.numpy()
                given_up += int(counts.given_up.sum())
            else:
                passes += counts * len(labels)
        latents = torch.cat(made)
        self.latents[label] = latents
        seen = quality.features(self.folder.classifier, self.pictures(latents))
        self.seen[label] = seen
        shares = [a / n if n else None for a, n in zip(accepted, judged, strict=True)]
        return ContinuousRun(
            label=label, batch=batch, pictures=count, seconds=seconds,
            passes_per_picture=passes / count,
            acceptance=accepted.sum() / judged.sum() if judged.any() else None,
            acceptance_at=shares if judged.any() else [], given_up=given_up,
            accuracy=quality.accuracy(self.folder.classifier, seen, self.labels[:count].numpy()),
            classifier=self.folder.classifier.config.name,
            distance=quality.Gaussian.of(seen).distance(self.folder.reference),
            distance_error=quality.distance_error(seen, self.folder.reference),
        )  # fmt: skip

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 [N, channels, height, width] in about [-1, 1]."""
        with torch.inference_mode():
            return torch.cat([self.folder.vae.decode(part) for part in latents.split(128)])

    def settings(self) -> dict[str, Any]:
        """What was asked for, for the report."""
        return {
            "methods": list(self.ways), "batches": self.batches, "pictures": len(self.labels),
            "temperature": self.temperature, "guidance": self.guidance, "seed": self.seed,
        }  # fmt: skip


def sheet_of(bench: ContinuousBench) -> dict[str, np.ndarray]:
    """Some pictures by every method, of the same classes and seeds, for ``images.save_sheet``."""
    chosen = shown(bench.folder.num_classes, min(map(len, bench.latents.values())))
    return {
        label: bench.pictures(latents[chosen]).numpy() for label, latents in bench.latents.items()
    }


def print_continuous_report(console: Console, report: ContinuousReport) -> None:
    table = Table(
        caption="made: pictures; passes: of the target's backbone, per picture; distance: "
        "Fréchet, to the data, with its bootstrap error"
    )
    # Labels are long: the table goes by numbers.
    labels = list(dict.fromkeys(run.label for run in report.runs))
    for number, label in enumerate(labels, 1):
        console.print(f"{number}  {label}", markup=False, soft_wrap=True)
    table.add_column("", justify="right", no_wrap=True, min_width=len(str(len(labels))))
    for name in ("batch", "made", "per s", "passes", "accepted", "accuracy", "distance"):
        table.add_column(name, justify="right", no_wrap=True)
    plain = {run.batch: run for run in report.runs if run.label == BASELINE}
    for run in report.runs:
        speed, base = f"{run.pictures_per_second:.2f}", plain.get(run.batch)
        if base is not None and run is not base:
            speed += f"\n({run.pictures_per_second / base.pictures_per_second:.2f}x)"
        table.add_row(
            str(labels.index(run.label) + 1), str(run.batch), str(run.pictures), speed,
            f"{run.passes_per_picture:.1f}",
            "" if run.acceptance is None else f"{run.acceptance:.2f}", f"{run.accuracy:.3f}",
            f"{run.distance:.2f} ±{run.distance_error:.2f}",
        )  # fmt: skip
    console.print(table)


def save_continuous_plot(report: ContinuousReport, path: Path) -> None:
    """Speed by batch size, and quality against passes at the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    plain = {run.batch: run.pictures_per_second for run in report.runs if run.label == BASELINE}
    largest = max(run.batch for run in report.runs)
    for label in dict.fromkeys(run.label for run in report.runs):
        runs = [run for run in report.runs if run.label == label]
        speeds = [run.pictures_per_second / plain.get(run.batch, 1.0) for run in runs]
        (line,) = axes[0].plot([run.batch for run in runs], speeds, "o-", label=label)
        for run in runs:
            if run.batch == largest:
                axes[1].errorbar(
                    run.passes_per_picture, run.distance, run.distance_error, marker="o",
                    color=line.get_color(),
                )  # fmt: skip
    axes[0].set_xscale("log", base=2)
    axes[0].set(xlabel="pictures in a batch", ylabel="pictures per s" + (
        f" relative to {BASELINE}" if plain else ""))  # fmt: skip
    axes[1].set(xlabel=f"target passes per picture, batches of {largest}",
                ylabel="Fréchet distance")  # fmt: skip
    figure.legend(loc="outside lower center", fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
