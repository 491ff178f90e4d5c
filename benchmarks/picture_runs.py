"""What the studies of relaxed acceptance share: pictures that are made once, and what they tell.

A method's pictures are kept in a folder as its engine made them, so that a study that was ended
goes on, and another may compare with the same ones. Every method makes the same classes by the same
seeds. Quality is asked as a question of non-inferiority (:func:`verdicts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from vllm_specplus.bench.images import ImageBench, ImageRun, save_sheet, sheet_of
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.image.quality import Gaussian, increase, same_law

#: Of the distance of a planted wrong rule: more than so much of an increase is a loss of quality.
MARGIN = 0.05
FIXED = {"policy": "fixed"}
#: Room for as many pictures of emoji as are in flight.
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}


class KeptBench(ImageBench):
    """A bench of image methods whose pictures are made once and kept in ``folder``."""

    def __init__(self, folder: Path, *args: Any):
        super().__init__(*args)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _measure(self, method: MethodSpec) -> dict[str, Any]:
        key = json.dumps([
            method.name, method.speculative_config, self.model, len(self.labels), self.in_flight,
            self.temperature, self.seed, self.engine_args,
        ], sort_keys=True)  # fmt: skip
        file = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if not file.exists():
            made = super()._measure(method)
            counted = json.dumps(made["counted"])
            new = file.with_suffix(".new.npz")
            np.savez(new, tokens=made["tokens"], seconds=made["seconds"], counted=counted, key=key)
            new.rename(file)
        with np.load(file, allow_pickle=False) as kept:
            return {
                "tokens": kept["tokens"], "seconds": float(kept["seconds"]),
                "counted": json.loads(str(kept["counted"])),
            }  # fmt: skip


def method(label: str, name: str, **keys: Any) -> MethodSpec:
    """One of ours, with its number of nodes fixed: what is compared are rules."""
    return MethodSpec(label, name, {"method": name, "control": FIXED} | keys)


def run(
    methods: list[MethodSpec], folder: Path, model: Path, pictures: int, in_flight: int,
    temperature: float, seed: int,
) -> KeptBench:  # fmt: skip
    """All pictures, those of plain decoding first. RuntimeError names a method that failed."""
    with progress() as notify:
        bench = KeptBench(
            folder, str(model), [MethodSpec(BASELINE, BASELINE, None), *methods], pictures,
            in_flight, temperature, seed, ENGINE, notify,
        )  # fmt: skip
        bench.run()
    if bench.failures:
        raise RuntimeError(f"failed: {bench.failures}")
    return bench


@contextmanager
def progress() -> Iterator:
    """What a bench tells, on the terminal."""
    with Progress() as bar:
        task = bar.add_task("", total=None)

        def notify(said: str | None, pictures: int) -> None:
            bar.update(task, advance=pictures, description=said)

        yield notify


def chosen(methods: list[MethodSpec], only: str | None, needed: set[str]) -> list[MethodSpec]:
    """Those of the labels ``only``, separated by semicolons, and those that all others are compared
    with; ValueError for a label that none has."""
    if only is None:
        return methods
    wanted = {label.strip() for label in only.split(";")} | needed
    if unknown := wanted - {each.label for each in methods}:
        raise ValueError(f"--only: there is no {sorted(unknown)[0]!r}")
    return [each for each in methods if each.label in wanted]


def verdicts(
    seen: dict[str, np.ndarray], reference: Gaussian, baseline: str, planted: str
) -> dict[str, dict[str, Any]]:
    """Of every method's features ``seen``: the increase of its Fréchet distance over that of
    ``baseline``, with its 95 % interval; whether the upper bound is below :data:`MARGIN` of the
    distance of a ``planted`` wrong rule; and the probability of pictures that differ as much from
    the baseline's if both had one law."""
    margin = MARGIN * Gaussian.of(seen[planted]).distance(reference)
    found = {}
    for label, features in seen.items():
        if label == baseline:
            continue
        more = increase(features, seen[baseline], reference)
        found[label] = {
            "increase": more.mean, "low": more.low, "high": more.high,
            "margin": margin, "not_inferior": bool(more.high < margin),
            "same_law_p": same_law(features, seen[baseline]),
        }  # fmt: skip
    return found


def rows(
    runs: list[ImageRun], told: dict[str, dict[str, Any]], baseline: str
) -> list[dict[str, Any]]:
    """A line of the result for each run: its own figures, how many times fewer target steps than
    ``baseline`` it took, and its verdict."""
    steps = {each.label: each.steps_per_picture for each in runs}
    return [
        each.model_dump()
        | {"times_fewer": steps[baseline] / each.steps_per_picture}
        | told.get(each.label, {})
        for each in runs
    ]


def print_rows(found: list[dict[str, Any]]) -> None:
    """A line each, with tabs."""
    names = ("times_fewer", "accuracy", "distance", "increase", "high", "not_inferior")
    print("method", *names, sep="\t")
    for row in found:
        values = (row.get(name) for name in names)
        shown = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
        print(row["label"], *shown, sep="\t")


def sheet(bench: KeptBench, path: Path) -> None:
    """A row of pictures of every method, by the same classes and seeds."""
    save_sheet(sheet_of(bench), path)
