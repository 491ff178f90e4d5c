"""The base of everything that is read from users and files."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

#: Most characters of what a user is told at once.
MOST_TOLD = 400
#: Most characters of a value or a path that a sentence repeats.
MOST_QUOTED = 80

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = MOST_QUOTED
_short.maxlevel = 3


def quoted(value: Any) -> str:
    """``repr(value)``, shortened to about a line, however large or deep the value is."""
    text = _short.repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 2 * MOST_QUOTED else f"{text[:MOST_QUOTED]}...{text[-20:]}"


class StrictModel(BaseModel):
    """Unknown keys are errors, values are not coerced, numbers are finite, nothing changes
    afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def nearest(given: Any, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, or None."""
    alike = str(given)[:MOST_TOLD].strip().casefold().replace("-", "_").replace(" ", "_")
    return next(iter(difflib.get_close_matches(alike, list(known), n=1)), None)


def told(about: str, problems: list[str]) -> str:
    """``about`` and as many of the problems, each a sentence, as fit into :data:`MOST_TOLD`."""
    text = f"{about}: {problems[0]}"
    for before, problem in enumerate(problems[1:], 1):
        more = f"; and {len(problems) - before} more"
        if len(text) + len(problem) + len(more) + 2 > MOST_TOLD:
            text += more
            break
        text += f"; {problem}"
    return text if len(text) <= MOST_TOLD else f"{text[: MOST_TOLD - 3]}..."


def sentences(error: ValidationError, model: type[StrictModel]) -> list[str]:
    """What is wrong, a sentence for each mistake; what is allowed at a place is told once."""
    texts, lists = [], set()
    for mistake in error.errors():
        text = sentence(mistake, model)
        if mistake["type"] == "extra_forbidden":
            key, _, allowed = text.partition(" (")
            text = key if allowed in lists else text
            lists.add(allowed)
        texts.append(text)
    return texts


def sentence(error: Mapping[str, Any], model: type[StrictModel]) -> str:
    """One mistake, as pydantic describes it, for the user; ``model`` was validated."""
    keys, allows = list(error["loc"]), "allowed"
    field = model.model_fields.get(str(keys[0])) if keys else None
    if field is not None and field.discriminator is not None:
        tag = str(field.discriminator)
        members = {
            m.model_fields[tag].annotation.__args__[0]: m for m in get_args(field.annotation)
        }
        if error["type"].startswith("union_tag"):
            given = error["input"].get(tag) if isinstance(error["input"], dict) else None
            what = (
                f"{keys[0]!r} needs a {tag}"
                if given is None
                else (f"unknown {keys[0]} {tag} {quoted(given)}")
            )
            return f"{what} (allowed: {', '.join(members)})"
        if len(keys) > 1:
            # pydantic puts the name of the chosen member between the keys.
            name = keys.pop(1)
            model, allows = members[name], f"{tag} {name!r} allows"
    key = ".".join(str(part) for part in keys)
    if error["type"] == "missing":
        return f"{key!r} is missing"
    if error["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in model.model_fields.items()]
        meant = nearest(keys[-1], known)
        hint = f", did you mean {meant!r}?" if meant else ""
        return f"unknown key {quoted(key)}{hint} ({allows}: {', '.join(known)})"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key!r} is {quoted(error['input'])}: {message}"
