"""The base of everything that is read from users and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Unknown keys are errors, values are not coerced, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
                else (f"unknown {keys[0]} {tag} {given!r}")
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
        known = (field.alias or name for name, field in model.model_fields.items())
        return f"unknown key {key!r} ({allows}: {', '.join(known)})"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key!r} is {error['input']!r}: {message}"
