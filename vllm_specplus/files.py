"""Files that a configuration names: what is wrong with one is a sentence that names it.

Nothing here reads weights, imports torch or runs what a file holds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from vllm_specplus.strict import MOST_QUOTED, quoted


def is_file(path: str | Path) -> bool:
    """Is there a file of that name? False also for what can be nobody's name."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def check_readable(path: str, key: str) -> None:
    """Raise ValueError unless ``path``, named by ``key``, is a file that can be read."""
    if not is_file(path):
        raise ValueError(f"{key} {quoted(path)} is not a file: name an existing one")
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{key} {quoted(path)} cannot be read: {error.strerror}") from None


def check_writable(path: str, key: str) -> None:
    """Raise ValueError unless a file ``path``, named by ``key``, can be written or replaced."""
    file = Path(path)
    try:
        if not path or file.is_dir():
            raise ValueError(f"{key} {quoted(path)} must be the name of a file: add one")
        folder = file.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"{key} {quoted(path)} is in a folder that does not exist: make it")
        # Rights alone do not tell of read-only and of unreal file systems.
        with tempfile.TemporaryFile(dir=folder):
            pass
        # A name of that length must be possible there.
        file.exists()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{key} {quoted(path)} cannot be written ({reason}): name another"
        ) from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object of a file; ``what`` names it to the user.

    Raises ValueError if it cannot be read, is no JSON or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deep to be read: write another") from None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {str(error)[:MOST_QUOTED]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} holds {quoted(content)}: it must be a JSON object")
    return content


def positive(config: dict[str, Any], key: str, what: str) -> int:
    """Return ``config[key]``; ValueError unless it is a whole number above 0."""
    if key not in config:
        raise ValueError(f"{what} has no {key!r}, which is needed: add it")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} has {key!r} {quoted(value)}: it must be a whole number above 0")
    return value


def tensor_shapes(path: Path, what: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors of a safetensors file, from its header.

    Raises ValueError if it is none, or is cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {str(error)[:MOST_QUOTED]}") from None
    except SafetensorError as error:
        raise ValueError(
            f"{what} is no safetensors file or cut short ({str(error)[:MOST_QUOTED]}): write it "
            f"again"
        ) from None
