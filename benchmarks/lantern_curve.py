"""LANTERN and LANTERN++ on an EAGLE head: speed against quality over k and delta, and the bound.

    python benchmarks/lantern_curve.py --json benchmarks/results/images/lantern.json
        --plot benchmarks/results/images/lantern.png --sheet ... --work DIR

Trees are the papers' static ones, of 25 and 57 nodes, drawn by ``demo_models/emoji/eagle``. Three
parts:

* *sampled*: target steps per picture and Fréchet distance by k and delta (LANTERN), by k and lambda
  (LANTERN++), and what is lossless; as in ``picture_quality.py``;
* *greedy*: a picture of each class at temperature 0: steps, share of codes that are plain
  decoding's, and how far the pixels are apart;
* *bound*: at places of pictures that the plain model drew, how far the output of one drafted
  position is from the target's law (total variation, computed and not drawn), beside what was lent.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from one_engine import save
from picture_runs import chosen, method, print_rows, rows, run, sheet, verdicts

from vllm_specplus.bench.images import ImageRun, save_image_plot
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.bench.report import describe_run
from vllm_specplus.cli.model import EMOJI_MODEL
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.image.quality import Gaussian
from vllm_specplus.image.vq import VQModel
from vllm_specplus.samplers.probabilities import Probabilities
from vllm_specplus.samplers.relaxed_sampling import Lantern, LanternPlus, RelaxedSampling
from vllm_specplus.training.batch import collate
from vllm_specplus.training.picture_head import PictureTarget, draw_pictures, load_llamagen
from vllm_specplus.training.steps import Chains
from vllm_specplus.training.texts import Text

LOSSLESS, PLANTED = "eagle, 25 nodes", "planted: accept all"
TREES = {25: "mc_sim_7b_63", 57: "naive_extend_57"}
#: The papers' k and delta, in kind: their codebooks have 16,384 and 8,192 codes.
LANTERN = [
    (10, 0.1), (10, 0.4), (100, 0.05), (100, 0.1), (100, 0.2), (100, 0.4), (1000, 0.1), (1000, 0.4),
]  # fmt: skip
LANTERN_PLUS = [(10, 2.0), (10, 5.0), (5, 10.0), (5, 20.0)]
#: Also in the tree of 57 nodes.
LARGE = (10, 5.0)


def eagle(label: str, nodes: int, acceptance: dict[str, Any] | None = None) -> MethodSpec:
    """The head of the model's folder, in a static tree."""
    keys: dict[str, Any] = {} if acceptance is None else {"acceptance": acceptance}
    return method(
        label, "eagle_tree", shape="static", static_tree=TREES[nodes],
        num_speculative_tokens=nodes, **keys,
    )  # fmt: skip


def methods(greedy: bool = False) -> list[MethodSpec]:
    """The lines of the curve; ``greedy``: those that mean something at temperature 0."""
    asked = {"greedy": True} if greedy else {}
    found = [eagle(LOSSLESS, 25), eagle("eagle, 57 nodes", 57)]
    for k, delta in LANTERN:
        rule = {"rule": "lantern", "k": k, "delta": delta} | asked
        found.append(eagle(f"lantern {k}, {delta}", 25, rule))
    for k, factor in LANTERN_PLUS:
        rule = {"rule": "lantern++", "k": k, "lambda": factor} | asked
        found.append(eagle(f"lantern++ {k}, {factor:g}", 25, rule))
        if (k, factor) == LARGE:
            found.append(eagle(f"lantern++ {k}, {factor:g}, 57 nodes", 57, rule))
    if not greedy:
        found.append(eagle(PLANTED, 25, {"rule": "lantern", "k": 1_000_000, "delta": 1.0}))
    return found


def greedy_rows(tokens: dict[str, np.ndarray], runs: list[ImageRun], model: Path) -> list[dict]:
    """What greedy pictures have in common with those of plain decoding."""
    vq, plain = VQModel.load(model), torch.from_numpy(tokens[BASELINE])
    side = round(plain.shape[1] ** 0.5)

    def pixels(codes: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([vq.decode(part) for part in codes.view(-1, side, side).split(64)])

    want = pixels(plain)
    found = []
    for each in runs:
        codes = torch.from_numpy(tokens[each.label])
        apart = (pixels(codes) - want).abs().mean().item()
        found.append({
            "label": each.label, "steps_per_picture": each.steps_per_picture,
            "same_codes": float((codes == plain).float().mean()), "pixels_apart": apart,
            "accuracy": each.accuracy, "relaxed_per_picture": each.relaxed_per_picture,
        })  # fmt: skip
    return found


@torch.inference_mode()
def laws(model: Path, pictures: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(p, q) float32 [n, V] of target and head at all places of some pictures but the first."""
    target = PictureTarget(load_llamagen(model), torch.float32)
    head = EagleHead(
        str(model / "eagle"), target, target.vocab_size, torch.device("cpu"), torch.float32
    )
    config = target.config
    labels = torch.arange(pictures) % config.num_classes
    drawn = draw_pictures(target.model, labels, torch.Generator().manual_seed(seed))
    for label, codes in zip(labels.tolist(), drawn.tolist(), strict=True):
        batch = collate([Text("", (config.label_token(label), *codes), 1, "target")])
        last = target.states(batch).last
        y = Chains(head, last[:, :-1]).step(batch.tokens[:, 1:])
        # The row of the head at i reads code i + 1, and says what the target says there.
        yield target.output(last[0, 1:-1]).softmax(-1), head.logits(y[0, :-1]).softmax(-1)


def bound(rule: RelaxedSampling, p: torch.Tensor, q: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of chains of one drafted position, float64 [n]: the probability of acceptance, the total
    variation of the output from ``p`` [n, V], and the most and mean mass that was lent."""
    count, size = p.shape
    known = Probabilities(p, q)
    row = torch.arange(count).repeat_interleave(size)
    token = torch.arange(size).repeat(count)
    masses = rule.masses(known, row, row, token)
    target_mass, draft_mass = (part.view(count, size) for part in masses)
    accepted = torch.where(draft_mass > 0, target_mass / draft_mass, 0.0).clamp(max=1).double()
    taken = q.double() * accepted
    rest = (p.double() - q.double()).clamp(min=0)  # the residual of the rule "optimal"
    rest = rest / rest.sum(-1, keepdim=True).clamp(min=1e-30)
    out = taken + (1 - taken.sum(-1, keepdim=True)) * rest
    lent = (target_mass - p).double()
    return {
        "accepted": taken.sum(-1), "tvd": (out - p.double()).abs().sum(-1) / 2,
        "lent_most": lent.amax(-1), "lent_mean": (q.double() * lent).sum(-1),
    }  # fmt: skip


def bounds(model: Path, pictures: int, seed: int) -> list[dict[str, Any]]:
    """Means over places, and the largest distance, of every rule."""
    codebook = VQModel.load(model).quantize.vectors().detach()
    rules: dict[str, RelaxedSampling] = {"lossless": Lantern(
        k=0, delta=0.0, residual="optimal", codebook=codebook
    )}  # fmt: skip
    for k, delta in LANTERN:
        rules[f"lantern {k}, {delta}"] = Lantern(
            k=k, delta=delta, residual="optimal", codebook=codebook
        )
    for k, factor in LANTERN_PLUS:
        rules[f"lantern++ {k}, {factor:g}"] = LanternPlus(
            k=k, lambda_=factor, residual="optimal", codebook=codebook
        )
    pairs = list(laws(model, pictures, seed))
    found = []
    for label, rule in rules.items():
        # Every 32nd place: a row of laws is judged for all codes.
        parts = [bound(rule, p[::32], q[::32]) for p, q in pairs]
        every = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found.append(
            {"label": label, "places": len(every["tvd"])}
            | {name: float(values.mean()) for name, values in every.items()}
            | {"tvd_most": float(every["tvd"].max())}
        )
    return found


def main(
    work: Annotated[Path, typer.Option(help="Folder where pictures are kept.")],
    model: Annotated[Path, typer.Option(help="Of an image model and its head.")] = EMOJI_MODEL,
    pictures: Annotated[int, typer.Option()] = 1000,
    in_flight: Annotated[int, typer.Option()] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[
        str | None, typer.Option(help="Labels, separated by ';', beside those that all need.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option()] = None,
    sheet_path: Annotated[Path | None, typer.Option("--sheet")] = None,
) -> None:
    """Make what is missing, and compare."""
    warm = chosen(methods(), only, {LOSSLESS, PLANTED})
    bench = run(warm, work, model, pictures, in_flight, 1.0, seed)
    told = verdicts(bench.seen, Gaussian.load(model), LOSSLESS, PLANTED)
    sampled = rows(bench.runs, told, LOSSLESS)
    print_rows(sampled)
    classes = bench.reads.config.num_classes
    labels = {each.label for each in warm}
    cold_methods = [each for each in methods(greedy=True) if each.label in labels]
    cold = run(cold_methods, work, model, classes, in_flight, 0.0, seed)
    greedy = greedy_rows(cold.tokens, cold.runs, model)
    lent = bounds(model, 32, seed)
    for row in (*greedy, *lent):
        print(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), sep="\t")
    with tempfile.TemporaryDirectory() as scratch:
        head = describe_run(Path(scratch) / "describe.log")
    if plot:
        save_image_plot(bench.runs, plot)
    if sheet_path:
        sheet(bench, sheet_path)
    if json_path:
        settings = {
            "model": model.name, "pictures": pictures, "concurrency": in_flight, "seed": seed,
        }  # fmt: skip
        report = {"settings": settings, "runs": sampled, "greedy": greedy, "bound": lent}
        save(json_path, head | report)


if __name__ == "__main__":
    typer.run(main)
