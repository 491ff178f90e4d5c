"""Two result files of the benchmark against each other: what has changed, and what is noise."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplus.bench import InputError
from vllm_specplus.bench.report import (
    AnswerReport,
    BenchReport,
    RunReport,
    bootstrap_interval,
)

#: What two files should have in common if their difference is to say anything.
SETTINGS = ("dataset", "limit", "rounds", "max_tokens", "temperature", "chat_template")


@dataclass(frozen=True)
class Change:
    """One quantity of both files: the median ratio of the pairs, the second file over the first.

    `interval`: 95 % of the bootstrap's medians; None with too few pairs.
    """

    ratio: float
    interval: tuple[float, float] | None
    pairs: int

    @property
    def is_noise(self) -> bool:
        """Whether nothing can be said."""
        return self.interval is None or self.interval[0] <= 1 <= self.interval[1]


@dataclass(frozen=True)
class Comparison:
    """A method at a load that both files have."""

    first: RunReport
    second: RunReport
    speed: Change
    """Tokens per second, by round."""
    later_tokens: Change | None
    """Time per token, by question; None where it was not kept by question."""


def read_report(path: Path) -> BenchReport:
    """Read what `bench --json` has written; InputError with a sentence for anything else."""
    try:
        return BenchReport.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        what = str(exc)
        if isinstance(exc, ValidationError):
            first = exc.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(f"--compare: {path} is no result of bench --json ({what})") from exc


def compare(first: BenchReport, second: BenchReport) -> list[Comparison]:
    """Pair what both files have measured, in the first one's order; InputError if nothing is."""
    others = {(run.method, run.load): run for run in second.runs}
    found = []
    for run in first.runs:
        other = others.get((run.method, run.load))
        if other is not None:
            found.append(Comparison(run, other, _speed(run, other), _later_tokens(run, other)))
    if not found:
        raise InputError("--compare: the files have no method at the same load in common")
    return found


def _speed(first: RunReport, second: RunReport) -> Change:
    before = {(item.repeat, item.round): item.tokens_per_s for item in first.rounds}
    after = {(item.repeat, item.round): item.tokens_per_s for item in second.rounds}
    pairs = [after[key] / before[key] for key in before if key in after]
    return _change(pairs or [second.tokens_per_s / first.tokens_per_s])


def _later_tokens(first: RunReport, second: RunReport) -> Change | None:
    before, after = _times(first.answers), _times(second.answers)
    pairs = [after[key] / before[key] for key in before if key in after]
    return _change(pairs) if pairs else None


def _times(answers: Sequence[AnswerReport]) -> dict[tuple[str, int], float]:
    return {
        (answer.question_id, answer.repeat): answer.tpot_ms for answer in answers if answer.tpot_ms
    }


def _change(pairs: Sequence[float]) -> Change:
    return Change(median(pairs), bootstrap_interval(pairs), len(pairs))


def differing_settings(first: BenchReport, second: BenchReport) -> Iterator[str]:
    """What makes the files hard to compare: a sentence each."""
    pairs = [(key, first.settings.get(key), second.settings.get(key)) for key in SETTINGS]
    pairs.append(("model", Path(first.model).name, Path(second.model).name))
    pairs.append(("cpu", first.machine.get("cpu_model"), second.machine.get("cpu_model")))
    pairs.append(("device", first.machine.get("device_name"), second.machine.get("device_name")))
    for name in sorted(first.versions.keys() | second.versions.keys()):
        pairs.append((name, first.versions.get(name), second.versions.get(name)))
    for name, one, other in pairs:
        if one != other:
            yield f"{name}: {one} in the first file, {other} in the second"


def print_comparison(console: Console, first: BenchReport, second: BenchReport) -> None:
    """Print the table, and what else differs between the runs."""
    table = Table(
        title="Second file over the first",
        caption="median of the pairs and its 95 % interval; noise: 1 is inside, or too few pairs",
        box=SIMPLE_HEAD,
    )
    table.add_column("method", overflow="fold")
    for name in ("load", "tokens/s", "ratio", "ms per later token", "tokens/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in compare(first, second):
        steps = (each.first.tokens_per_step, each.second.tokens_per_step)
        table.add_row(
            escape(each.first.method),
            each.first.load.short,
            f"{each.first.tokens_per_s:.0f} → {each.second.tokens_per_s:.0f}",
            _shown(each.speed),
            "–" if each.later_tokens is None else _shown(each.later_tokens),
            " → ".join("–" if value is None else f"{value:.2f}" for value in steps),
        )
    console.print(table)
    for line in differing_settings(first, second):
        console.print(f"Not the same: {line}.", markup=False, highlight=False)


def _shown(change: Change) -> str:
    interval = ""
    if change.interval is not None:
        interval = f"\n{change.interval[0]:.2f}–{change.interval[1]:.2f}"
    return f"{change.ratio:.2f}{interval}{' noise' * change.is_noise}"
