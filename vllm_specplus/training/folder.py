"""The folder of a run. Whatever is in it under its own name is whole: it was written beside, and
renamed when it was on disk."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_specplus.strict import quoted
from vllm_specplus.training.errors import TrainingError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells in one sentence why something cannot be written, as on a full disk."""
    try:
        yield
    # What safetensors and tokenizers cannot write they tell by errors of their own.
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"{path} cannot be written ({reason}): make room or name another --out; the same "
            f"command goes on with what is there"
        ) from error


def sync(path: Path) -> None:
    """Has a file or a folder's entries on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a file, all of it or nothing."""
    new = path.with_name(f"{path.name}.new")
    with writing(path):
        new.write_text(text, encoding="utf-8")
        sync(new)
        new.replace(path)
        sync(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Writes a folder, all of what ``fill`` puts into it or nothing, over one of that name."""
    new = path.with_name(f"{path.name}.new")
    with writing(path):
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            fill(new)
            for each in [*new.rglob("*"), new]:
                sync(each)
            shutil.rmtree(path, ignore_errors=True)
            new.rename(path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        sync(path.parent)


class RunFolder:
    """Where a run keeps what it has written."""

    def __init__(self, path: Path):
        self.path = path
        self.lock: tuple[int, ...] = ()
        """The handle that keeps others out while :meth:`held`."""
        self.texts = path / "texts.jsonl"
        self.questions = path / "questions.jsonl"
        """Prompts of the texts that the target has to write."""
        self.measured_texts = path / "measured_texts.jsonl"
        self.log = path / "log.jsonl"
        self.plot = path / "plot.png"
        self.measured = path / "measured.json"
        self.settings = path / "settings.json"
        self.checkpoints = path / "checkpoint"
        self.result = path / "result"

    def epoch_texts(self, epoch: int) -> Path:
        """The file of texts that were written for an epoch."""
        return self.path / f"texts-{epoch}.jsonl"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it for the time being.

        The lock is the kernel's: it ends with the process and with those it has started, which may
        still be writing here.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TrainingError(
                    f"another run is using {self.path}: wait for it, or name another --out"
                ) from None
            self.lock = (handle,)
            yield
        finally:
            self.lock = ()
            os.close(handle)

    def take_settings(self, settings: dict[str, Any]) -> None:
        """Keeps what the run was started with; TrainingError if the folder holds a run of other
        settings, whose checkpoint would be taken for this one's."""
        if not self.settings.exists():
            if others := sorted(each.name for each in self.path.iterdir() if each.name != ".lock"):
                raise TrainingError(
                    f"{self.path} holds {quoted(others[0])} but no run: name a new or empty folder"
                )
            write_text(self.settings, json.dumps(settings, indent=1) + "\n")
            return
        before = json.loads(self.settings.read_text(encoding="utf-8"))
        for key in [*before, *settings]:
            old, new = before.get(key), settings.get(key)
            if old != new:
                raise TrainingError(
                    f"{self.path} holds a run with {key} {quoted(old)}, now it is {quoted(new)}: "
                    f"name another --out (with --data {self.texts} for the same texts) or take the "
                    f"settings of before"
                )
