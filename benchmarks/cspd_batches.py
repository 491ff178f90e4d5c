"""CSpD against batch size: where it is faster, where that ends, and what it costs.

    python benchmarks/cspd_batches.py --json benchmarks/results/latents/cspd.json
        --plot benchmarks/results/latents/cspd.png --sheet ...

For the causal and the masked model of ``demo_models/emoji_latents``, in batches of 1, 8, 32, 128:

* pictures per second, beside the seconds that target, draft and residuals took, by network: where
  batches stop paying is where a verified latent costs what a decoded one does;
* the share of drafts that is accepted at every place of a picture;
* Fréchet distances of the largest batch's pictures, with the interval of their increase over the
  target's, against a planted rule that accepts every draft; and the probability that pictures of
  the target alone, drawn by other seeds, differ as much as the method's do (a permutation test):
  the exact rule must pass it, the planted one must not.

Rules are the exact one, the paper's (``SIG`` in it) and the released code's (``reference``); masked
drafts are verified in their own contexts, which is exact, and in shared ones, as the code does.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from one_engine import save
from picture_runs import MARGIN, progress

from vllm_specplus.bench.continuous import ContinuousBench, ContinuousRun, sheet_of
from vllm_specplus.bench.images import save_sheet
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.bench.report import describe_run
from vllm_specplus.cli.model import EMOJI_LATENTS_MODEL
from vllm_specplus.image.continuous import acceptance, decoding, masked
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.quality import Gaussian, increase, same_law
from vllm_specplus.training.latents import ITERATIONS

PLANTED = "planted: accept all"
#: Between the seeds of the target's pictures and those that a law is tested against.
APART = 1_000_000


def cspd(label: str, **keys: Any) -> MethodSpec:
    return MethodSpec(label, "cspd", {"method": "cspd", "window": 4} | keys)


#: By model, and by the name that a line of the result has.
METHODS = {
    "causal": [
        cspd("exact, 4"),
        cspd("exact, 8", window=8),
        cspd("exact, 4, not aligned", aligned=False),
        cspd("exact, 4, first 13 not drafted", prefill=13),  # 5 %, as in the paper
        cspd("exact, 4, 3 steps", steps=3),
        cspd("paper, 4", rule="paper"),
        cspd("reference, 4", rule="reference"),
        cspd(PLANTED),
    ],
    "masked": [
        cspd("exact, own, 4", contexts="own"),
        cspd("exact, shared, 4", contexts="shared"),
        cspd("exact, shared, 8", contexts="shared", window=8),
        cspd("paper, shared, 4", contexts="shared", rule="paper"),
        cspd("reference, shared, 4", contexts="shared", rule="reference"),
        MethodSpec("target, a quarter of the iterations", "plain", {"iterations": 4}),
        cspd(PLANTED, contexts="own"),
    ],
}


class Clock:
    """Seconds by what took them: networks of target and draft, and residuals."""

    def __init__(self, folder: LatentsFolder):
        self._heads = {id(folder.target.head): "target", id(folder.draft.head): "draft"}
        self._models = {id(folder.target): "target", id(folder.draft): "draft"}
        self.seconds: Counter[str] = Counter()

    def _timed(self, call: Callable, name: Callable[..., str]) -> Callable:
        def timed(*args, **keys):
            start = time.perf_counter()
            out = call(*args, **keys)
            self.seconds[name(*args)] += time.perf_counter() - start
            return out

        return timed

    @contextmanager
    def running(self, folder: LatentsFolder) -> Iterator[None]:
        """What is called meanwhile is timed; heads by their identity, backbones by a wrapper of
        their own."""
        heads = self._heads
        replaced = [
            (decoding, "denoise", lambda head, *_: f"{heads[id(head)]}'s head"),
            (masked, "denoise", lambda head, *_: f"{heads[id(head)]}'s head"),
            (acceptance, "residual", lambda *_: "residuals"),
            (masked, "residual", lambda *_: "residuals"),
        ]
        kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
        for module, name, of in replaced:
            setattr(module, name, self._timed(getattr(module, name), of))
        for model in (folder.target, folder.draft):
            self._wrap(model, self._models[id(model)])
        try:
            yield
        finally:
            for module, name, original in kept:
                setattr(module, name, original)
            for model in (folder.target, folder.draft):
                vars(model).pop("conditions", None)
                vars(model).pop("begin", None)

    def _wrap(self, model: torch.nn.Module, who: str) -> None:
        name = f"{who}'s backbone"
        if isinstance(model, masked.MaskedLatents):
            vars(model)["conditions"] = self._timed(model.conditions, lambda *_: name)
            return
        begin = model.begin

        def timed_begin(*args):
            session = begin(*args)
            session.conditions = self._timed(session.conditions, lambda *_: name)
            return session

        vars(model)["begin"] = timed_begin


@contextmanager
def accepting_all() -> Iterator[None]:
    """The planted wrong rule: every draft is kept."""
    kept = acceptance.log_ratio

    def all_kept(draft, target, rule="exact"):
        return torch.full_like(draft.path_log_sigma, torch.inf)

    acceptance.log_ratio = masked.log_ratio = all_kept
    try:
        yield
    finally:
        acceptance.log_ratio = masked.log_ratio = kept


class BatchBench(ContinuousBench):
    """Of the largest batch all pictures are made, and every part is timed."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.parts: list[dict[str, float]] = []
        """Seconds by part, of each run."""

    def _count(self, batch: int) -> int:
        return len(self.labels) if batch == max(self.batches) else super()._count(batch)

    def _measure(self, label: str, way: Callable, batch: int) -> ContinuousRun:
        clock = Clock(self.folder)
        with accepting_all() if label == PLANTED else nullcontext(), clock.running(self.folder):
            found = super()._measure(label, way, batch)
        self.parts.append(dict(clock.seconds))
        return found


def bench_of(
    model: Path, methods: list[MethodSpec], pictures: int, batches: list[int], seed: int
) -> BatchBench:
    with progress() as notify:
        bench = BatchBench(str(model), methods, pictures, batches, 1.0, 1.0, seed, notify)
        bench.run()
    return bench


def judged(bench: BatchBench, other: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of every method, at the largest batch: the increase of its distance over the target's, and
    the probability of such pictures beside ``other``, the target's by other seeds."""
    reference, plain = bench.folder.reference, bench.seen[BASELINE]
    margin = MARGIN * Gaussian.of(bench.seen[PLANTED]).distance(reference)
    found = {}
    for label, seen in bench.seen.items():
        more = increase(seen, plain, reference)
        found[label] = {
            "increase": more.mean, "low": more.low, "high": more.high, "margin": margin,
            "not_inferior": bool(more.high < margin), "same_law_p": same_law(seen, other),
        }  # fmt: skip
    return found


def rows(bench: BatchBench, told: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line of the result for each run: its own figures, its speed beside the target's, seconds by
    part, and at the largest batch its verdict."""
    plain = {run.batch: run for run in bench.runs if run.label == BASELINE}
    found = []
    for run, parts in zip(bench.runs, bench.parts, strict=True):
        speed = run.pictures_per_second
        found.append(
            run.model_dump()
            | {"pictures_per_second": speed, "parts_s": parts}
            | {"ratio_vs_none": speed / plain[run.batch].pictures_per_second}
            | (told.get(run.label, {}) if run.batch == max(bench.batches) else {})
        )
    return found


def plot(report: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Speed by batch, and acceptance by place, of both models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(report), 2, figsize=(11, 4 * len(report)), squeeze=False, layout="constrained"
    )
    for (kind, runs), (left, right) in zip(report.items(), axes, strict=True):
        largest = max(run["batch"] for run in runs)
        for label in dict.fromkeys(run["label"] for run in runs):
            own = [run for run in runs if run["label"] == label]
            ratios = [run["ratio_vs_none"] for run in own]
            left.plot([run["batch"] for run in own], ratios, "o-", label=label)
            shares = next(run for run in own if run["batch"] == largest)["acceptance_at"]
            if shares and label != PLANTED:
                values = np.array([np.nan if share is None else share for share in shares])
                groups = [np.nanmean(part) for part in np.array_split(values, 16)]
                right.plot(np.linspace(0, len(values), 16), groups, label=label)
        left.set(xscale="log", xlabel="pictures in a batch", ylabel=f"{kind}: speed / target's")
        right.set(xlabel="place in the order of drawing", ylabel="drafts accepted", ylim=(0, 1))
        left.legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    model: Annotated[Path, typer.Option(help="Folder of models of latents.")] = EMOJI_LATENTS_MODEL,
    kinds: Annotated[str, typer.Option(help="Which of its models.")] = "causal,masked",
    pictures: Annotated[int, typer.Option(help="In batches of the largest size.")] = 2048,
    batches: Annotated[str, typer.Option()] = "1,8,32,128",
    seed: Annotated[int, typer.Option()] = 0,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None,
    sheet_path: Annotated[
        Path | None, typer.Option("--sheet", help="Its name gets the kind's.")
    ] = None,
) -> None:
    """Measure all, print and write."""
    sizes, report = [int(size) for size in batches.split(",")], {}
    for kind in kinds.split(","):
        folder = model / "masked" if kind == "masked" else model
        plain = MethodSpec(BASELINE, BASELINE, None)
        bench = bench_of(folder, [plain, *METHODS[kind]], pictures, sizes, seed)
        again = bench_of(folder, [plain], pictures, [max(sizes)], seed + APART)
        report[kind] = rows(bench, judged(bench, again.seen[BASELINE]))
        for row in report[kind]:
            parts = {name: round(value, 1) for name, value in row["parts_s"].items()}
            print(kind, row["label"], row["batch"], f"{row['ratio_vs_none']:.2f}", parts, sep="\t")
        if sheet_path:
            save_sheet(sheet_of(bench), sheet_path.with_stem(f"{sheet_path.stem}_{kind}"))
    if plot_path:
        plot(report, plot_path)
    if json_path:
        with tempfile.TemporaryDirectory() as scratch:
            head = describe_run(Path(scratch) / "describe.log")
        settings = {
            "model": model.name, "pictures": pictures, "batches": sizes, "seed": seed,
            "iterations": ITERATIONS,
        }  # fmt: skip
        save(json_path, head | {"settings": settings} | report)


if __name__ == "__main__":
    typer.run(main)
