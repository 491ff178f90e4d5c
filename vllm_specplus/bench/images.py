"""``vllm-specplus bench --task image``: speed of image generation against quality.

Of models whose tokens are codes, and of those whose tokens are latents.

Every method makes the same classes in an engine of its own, one engine after the other, and is
measured after a round to warm up. Steps are the target's, counted once per request; plain
decoding takes one for each code. Quality is the share of pictures that show their class and the
Fréchet distance, both by the classifier in the model's folder, whose name a run has: to the
pictures it was trained on, and to what plain decoding made.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from vllm_specplus.bench import InputError
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.bench.report import ReportHead
from vllm_specplus.bench.runner import Notify
from vllm_specplus.registry import method_names


class ImageJob(BaseModel):
    """What the process of one engine is to do."""

    engine: dict[str, Any]
    labels: list[int]
    in_flight: int
    temperature: float
    seed: int
    out: str
    """File for the tokens, [N, ...], and what was counted."""


class ImageRun(BaseModel):
    """One method."""

    label: str
    lossy: bool
    pictures: int
    seconds: float
    steps_per_picture: float
    """Of the target, a picture's own; prompts not counted."""
    nodes_per_step: float
    relaxed_per_picture: float
    """Codes that only a relaxed rule accepted."""
    accuracy: float
    classifier: str
    """The network whose features the distances are of; others' cannot be compared."""
    distance: float
    distance_error: float
    """Bootstrap."""
    distance_to_plain: float | None
    distance_to_plain_error: float | None
    codes: int | None
    """Different codes in use, a sign of collapse; None: the tokens are latents."""

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / self.seconds


class ImageReport(ReportHead):
    """The JSON file."""

    runs: list[ImageRun]
    failures: dict[str, str]


#: Where, in a model's folder, the draft of a method is that needs one.
DRAFTS = {"cspd": "draft", "eagle_tree": "eagle"}
#: Most pictures in a row of a sheet.
SHEET = 24
#: Begins a line of the process's output that says how many more pictures are made.
MADE = "made: "


def measure(job: ImageJob) -> None:
    """In a process of its own."""
    from tqdm import tqdm
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_specplus.image.pictures import pictures_of

    llm = LLM(**job.engine)
    model = llm.llm_engine.model_config
    pictures = pictures_of(model.hf_config, model.model)

    def counters() -> dict[str, float]:
        (values,) = llm.collective_rpc(_counters)
        return values

    class Told(tqdm):
        """vLLM's progress bar, as lines of output."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def update(self, n=1):
            if self.desc.startswith("Processed"):  # not when requests are added
                print(f"{MADE}{n}", flush=True)
            return super().update(n)

    def generate(labels: list[int], seed: int, bar=False):
        prompts = [
            TokensPrompt(prompt_token_ids=[model.hf_config.label_token(i)]) for i in labels
        ]  # fmt: skip
        params = [
            SamplingParams(temperature=job.temperature, seed=seed + i, **pictures.sampling)
            for i in range(len(labels))
        ]
        return llm.generate(prompts, params, use_tqdm=bar)

    generate(job.labels[: 2 * job.in_flight], job.seed + 10**6)
    before, start = counters(), time.perf_counter()
    done = generate(job.labels, job.seed, Told)
    seconds = time.perf_counter() - start
    tokens = np.stack([pictures.tokens(each.outputs[0]).numpy() for each in done])
    after = counters()
    counted = {name: value - before[name] for name, value in after.items()}
    np.savez(job.out, tokens=tokens, seconds=seconds, counted=json.dumps(counted))


def _counters(worker) -> dict[str, float]:
    drafter = getattr(worker.model_runner, "drafter", None)
    return drafter.counters.as_dict() if hasattr(drafter, "counters") else {}


class ImageBench:
    """Measures methods one by one; ``notify`` is told which, and of pictures that are made, as
    ``runner.Benchmark`` tells of questions."""

    def __init__(
        self, model: str, methods: list[MethodSpec], pictures: int, in_flight: int,
        temperature: float, seed: int, engine_args: dict[str, Any], notify: Notify,
    ):  # fmt: skip
        from vllm_specplus.image.pictures import load_pictures
        from vllm_specplus.image.quality import Gaussian, PictureClassifier

        folder = Path(model)
        if not (folder / "classifier").is_dir():
            raise InputError(
                f"--model: {model} has no classifier to judge pictures with: use the folder that "
                f"`vllm-specplus prepare-model --image` prints"
            )
        self.reads = load_pictures(folder)
        if self.reads is None:
            raise InputError(f"--model: {model} is no model that --task image knows")
        self.classifier = PictureClassifier.load(folder)
        self.reference = Gaussian.load(folder)
        self.model, self.methods, self.notify = model, methods, notify
        self.in_flight, self.temperature, self.seed = in_flight, temperature, seed
        self.engine_args = engine_args
        for method in methods:
            if method.name not in (BASELINE, *method_names()):
                # Their steps are not counted.
                raise InputError(
                    f"--methods: --task image measures {BASELINE} and methods of vllm-specplus, "
                    f"not {method.name}"
                )
        if pictures < 2:
            raise InputError("--limit: a distance needs at least 2 pictures")
        self._told = 0  # pictures of the current method
        self.labels = [i % self.reads.config.num_classes for i in range(pictures)]
        self.tokens: dict[str, np.ndarray] = {}
        self.seen: dict[str, np.ndarray] = {}
        """Features of the pictures of every method."""
        self.runs: list[ImageRun] = []
        self.failures: dict[str, str] = {}

    def run(self) -> None:
        plain = None
        # Plain decoding first: the others are compared with its pictures.
        for method in sorted(self.methods, key=lambda method: method.name != BASELINE):
            self.notify(f"{method.label}: starting", 0)
            try:
                found = self._measure(method)
            except subprocess.CalledProcessError as error:
                self.failures[method.label] = error.stderr.strip().splitlines()[-1]
                self.notify(f"{method.label}: failed", len(self.labels) - self._told)
                continue
            self.tokens[method.label] = found["tokens"]
            run, plain = self._judge(method, found, plain)
            self.runs.append(run)

    def _measure(self, method: MethodSpec) -> dict[str, Any]:
        engine = {
            "model": self.model, "skip_tokenizer_init": True, "max_num_seqs": self.in_flight,
            "max_model_len": 1 + self.reads.config.grid_size**2, "disable_log_stats": True,
            "kv_cache_memory_bytes": 1 << 28, "seed": self.seed,
        } | self.engine_args  # fmt: skip
        if method.speculative_config is not None:
            engine["speculative_config"] = dict(method.speculative_config)
            if (own := DRAFTS.get(method.name)) is not None:
                engine["speculative_config"].setdefault("model", f"{self.model}/{own}")
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/result.npz"
            job = ImageJob(
                engine=engine, labels=self.labels, in_flight=self.in_flight,
                temperature=self.temperature, seed=self.seed, out=out,
            )  # fmt: skip
            # The engine in the job's own process: its counters can be read there.
            env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
            self._told = 0
            command = [sys.executable, "-m", "vllm_specplus.bench.images"]
            with (
                open(f"{folder}/log", "w+") as log,
                subprocess.Popen(
                    command, env=os.environ | env, text=True, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=log,
                ) as process,
            ):  # fmt: skip
                try:
                    process.stdin.write(job.model_dump_json())
                    process.stdin.close()
                    for line in process.stdout:
                        if line.startswith(MADE):
                            self._made(method.label, int(line.removeprefix(MADE)))
                except BaseException:  # whoever is interrupted leaves no engine behind
                    process.kill()
                    raise
                if process.wait():
                    log.seek(0)
                    raise subprocess.CalledProcessError(
                        process.returncode, command, stderr=log.read()
                    )
            with np.load(out, allow_pickle=False) as found:
                return {
                    "tokens": found["tokens"], "seconds": float(found["seconds"]),
                    "counted": json.loads(str(found["counted"])),
                }  # fmt: skip

    def _made(self, label: str, pictures: int) -> None:
        self.notify(None if self._told else f"{label}: measuring", pictures)
        self._told += pictures

    def _judge(self, method: MethodSpec, found: dict[str, Any], plain):
        from vllm_specplus.image import quality

        tokens, counted = found["tokens"], found["counted"]
        seen = quality.features(self.classifier, self.pictures(tokens))
        self.seen[method.label] = seen
        gaussian = quality.Gaussian.of(seen)
        pictures = len(tokens)
        # Plain decoding counts nothing; its first code comes with the prompt.
        steps = counted.get("request_steps", pictures * (tokens.shape[1] - 1.0))
        run = ImageRun(
            label=method.label,
            lossy=method.lossy,
            pictures=pictures,
            seconds=found["seconds"],
            steps_per_picture=steps / pictures,
            nodes_per_step=counted.get("nodes_drafted", 0.0) / steps,
            relaxed_per_picture=counted.get("relaxed_tokens", 0.0) / pictures,
            accuracy=quality.accuracy(self.classifier, seen, np.array(self.labels)),
            classifier=self.classifier.config.name,
            distance=gaussian.distance(self.reference),
            distance_error=quality.distance_error(seen, self.reference),
            distance_to_plain=None if plain is None else gaussian.distance(plain),
            distance_to_plain_error=None if plain is None else quality.distance_error(seen, plain),
            codes=len(np.unique(tokens)) if tokens.ndim == 2 else None,
        )
        return run, gaussian if method.name == BASELINE else plain

    def pictures(self, tokens: np.ndarray):
        """float32 [N, channels, height, width] in about [-1, 1] of the tokens of N requests."""
        import torch

        return torch.cat([self.reads.decode(part) for part in torch.from_numpy(tokens).split(128)])


def sheet_of(bench: ImageBench) -> dict[str, np.ndarray]:
    """Some pictures by every method, of the same classes and seeds, for :func:`save_sheet`."""
    chosen = shown(bench.reads.config.num_classes, len(bench.labels))
    return {label: bench.pictures(tokens[chosen]).numpy() for label, tokens in bench.tokens.items()}


def shown(classes: int, pictures: int) -> list[int]:
    """Which of the ``pictures``, of all ``classes`` in turn, a sheet shows: two of each class, or,
    where that is no sheet any more, one of classes that are evenly apart."""
    if 2 * classes <= SHEET:
        return list(range(min(2 * classes, pictures)))
    return [i * classes // SHEET for i in range(SHEET) if i * classes // SHEET < pictures]


def print_image_report(console: Console, report: ImageReport) -> None:
    table = Table(title=f"{report.settings['pictures']} pictures, "
                        f"{report.settings['concurrency']} in flight",
                  caption="steps: of the target, per picture; relaxed: codes per picture that only "
                          "a relaxed rule accepted; distance: Fréchet, to the data and to plain's "
                          "pictures, with its bootstrap error")  # fmt: skip
    table.add_column("", justify="right", no_wrap=True, min_width=len(str(len(report.runs))))
    for name in ("pictures\nper s", "steps", "relaxed", "accuracy", "distance", "to plain's"):
        table.add_column(name, justify="right", no_wrap=True)
    plain = next((run for run in report.runs if run.label == BASELINE), None)
    # Labels are long: the table goes by numbers.
    for number, run in enumerate(report.runs, 1):
        lossy = "  LOSSY" if run.lossy else ""
        console.print(f"{number}  {run.label}{lossy}", markup=False, soft_wrap=True)
        speed, steps = f"{run.pictures_per_second:.2f}", f"{run.steps_per_picture:.1f}"
        if plain is not None and run is not plain:
            speed += f"\n({run.pictures_per_second / plain.pictures_per_second:.2f}x)"
            steps += f"\n({plain.steps_per_picture / run.steps_per_picture:.2f}x less)"
        to_plain = ""
        if run.distance_to_plain is not None:
            to_plain = f"{run.distance_to_plain:.2f} ±{run.distance_to_plain_error:.2f}"
        table.add_row(
            str(number), speed, steps,
            f"{run.relaxed_per_picture:.1f}", f"{run.accuracy:.3f}",
            f"{run.distance:.2f} ±{run.distance_error:.2f}", to_plain,
        )  # fmt: skip
    console.print(table)
    for label, reason in report.failures.items():
        console.print(f"{label} failed: {reason}", markup=False)


def save_image_plot(runs: list[ImageRun], path: Path) -> None:
    """Quality against speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for run in runs:
        marker = "s" if not run.lossy else "o"
        axes[0].errorbar(
            run.steps_per_picture, run.distance, run.distance_error, marker=marker, label=run.label
        )
        axes[1].plot(run.steps_per_picture, run.accuracy, marker)
    for axis, name in zip(axes, ("Fréchet distance", "class accuracy"), strict=True):
        axis.set(xlabel="target steps per picture", ylabel=name)
    # Labels are long: beside the axes nothing is hidden.
    figure.legend(loc="outside lower center", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_sheet(rows: dict[str, np.ndarray], path: Path) -> None:
    """A row of pictures of every method: ``rows`` float32 [N, 1 or 3, height, width] in about
    [-1, 1]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(0.45 * shown, len(rows) * 0.8), squeeze=False, layout="constrained"
    )
    for axis, (label, row) in zip(axes[:, 0], rows.items(), strict=True):
        pixels = ((row.clip(-1, 1) + 1) / 2).transpose(0, 2, 3, 1)
        axis.imshow(np.concatenate(pixels, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(label, fontsize=7)
        axis.axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    measure(ImageJob.model_validate_json(sys.stdin.read()))
