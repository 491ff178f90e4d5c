"""The curve of a run: ``log.jsonl``, an object a step, and the plot of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_specplus.training.folder import write_text, writing

#: Steps that a point of the plot is the mean of, at most this many points.
POINTS = 200


class Curve:
    """What the steps of a run have shown so far."""

    def __init__(self, path: Path):
        self._path = path

    def restart(self, step: int) -> None:
        """Forgets all that was logged behind the first ``step`` steps, which will be made again."""
        if self._path.exists():
            kept = [entry for entry in self.entries() if entry["step"] <= step]
            write_text(self._path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a step; it is there for others to read at once."""
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(entry)}\n")

    def entries(self) -> list[dict[str, Any]]:
        """All that was logged; a last line that was not finished is none."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def plot(self, path: Path) -> None:
        """Draws the loss, and every other mean that was logged, over the steps; nothing without
        matplotlib, or without steps."""
        entries = self.entries()
        if not entries or find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure

        names = [n for n in entries[-1] if n not in ("step", "epoch", "done", "seconds", "tokens")]
        names.sort(key=lambda name: name != "loss")
        figure = Figure(figsize=(7, 2.2 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            known = [entry for entry in entries if name in entry]
            size = -(-len(known) // POINTS)
            groups = [known[i : i + size] for i in range(0, len(known), size)]
            axes.plot(
                [group[-1]["step"] for group in groups],
                [sum(entry[name] for entry in group) / len(group) for group in groups],
            )
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        axes.set_xlabel("step")
        with writing(path):
            figure.savefig(path, dpi=100)
