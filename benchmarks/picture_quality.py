"""Fewer target steps at no loss of quality? Jacobi decoding and the rules that relax it.

    python benchmarks/picture_quality.py --json benchmarks/results/images/quality.json
        --sheet benchmarks/results/images/quality_sheet.png --work DIR

For each method: target steps per picture, how many times fewer than lossless Jacobi, and whether
its pictures are non-inferior: is the upper 95 % bound of the increase in Fréchet distance below
5 % of the distance of a planted wrong rule? The distance is of features of the classifier in the
model's folder, whose name is in the result; the planted rule accepts whatever is drafted, and is
itself judged. Windows are fixed at 16, as in the papers' code, and initial places and filters are
theirs and ours. Pictures that are in --work are not made again, so that a run may be ended, or be
of some methods first (--only).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from one_engine import save
from picture_runs import chosen, method, print_rows, rows, run, sheet, verdicts

from vllm_specplus.bench.methods import MethodSpec
from vllm_specplus.bench.report import describe_run
from vllm_specplus.cli.model import EMOJI_MODEL
from vllm_specplus.image.quality import Gaussian

LOSSLESS, PLANTED = "jacobi", "planted: accept all"
GSD = {"rule": "gsd", "group": 14, "max_gap": 0.15}


def jacobi(label: str, acceptance: dict[str, Any] | None = None, **keys: Any) -> MethodSpec:
    """In a window of 16."""
    if acceptance is not None:
        keys["acceptance"] = acceptance
    return method(label, "jacobi", num_speculative_tokens=15, **keys)


#: By the name that a line of the result has.
METHODS = [
    jacobi(LOSSLESS),
    jacobi("jacobi, any code", initial="random"),
    jacobi("gsd 14", GSD),
    jacobi("gsd 14, distance 0.5", GSD | {"max_distance": 0.5}),
    jacobi("gsd 14, distance 0.5, any code", preset="lumina_mgpt"),
    jacobi("gsd 4, distance 0.5", GSD | {"group": 4, "max_distance": 0.5}),
    jacobi("gsd 25, distance 0.5", GSD | {"group": 25, "max_distance": 0.5}),
    jacobi("gsd 50, distance 0.5", GSD | {"group": 50, "max_distance": 0.5}),
    jacobi("lantern++ 10, 2", {"rule": "lantern++", "k": 10, "lambda": 2.0}),
    jacobi("lantern++ 10, 5", {"rule": "lantern++", "k": 10, "lambda": 5.0}),
    jacobi("lantern++ 50, 10", {"rule": "lantern++", "k": 50, "lambda": 10.0}),
    jacobi(PLANTED, {"rule": "lantern", "k": 1_000_000, "delta": 1.0}),
]


def main(
    work: Annotated[Path, typer.Option(help="Folder where pictures are kept.")],
    model: Annotated[Path, typer.Option(help="Folder of an image model.")] = EMOJI_MODEL,
    pictures: Annotated[int, typer.Option()] = 5000,
    in_flight: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[
        str | None, typer.Option(help="Labels, separated by ';', beside those that all need.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    sheet_path: Annotated[Path | None, typer.Option("--sheet")] = None,
) -> None:
    """Make what is missing, and compare."""
    methods = chosen(METHODS, only, {LOSSLESS, PLANTED})
    bench = run(methods, work, model, pictures, in_flight, temperature, seed)
    told = verdicts(bench.seen, Gaussian.load(model), LOSSLESS, PLANTED)
    found = rows(bench.runs, told, LOSSLESS)
    print_rows(found)
    if sheet_path:
        sheet(bench, sheet_path)
    if json_path:
        with tempfile.TemporaryDirectory() as scratch:
            head = describe_run(Path(scratch) / "describe.log")
        settings = {
            "model": model.name, "pictures": pictures, "concurrency": in_flight,
            "temperature": temperature, "seed": seed, "window": 16,
        }  # fmt: skip
        save(json_path, head | {"settings": settings, "runs": found})


if __name__ == "__main__":
    typer.run(main)
