"""Which drafting methods there are, and where: ours, and those of other packages.

A method is one file that holds its configuration and its proposer, registered by
:func:`register_method`. Ours lie in ``proposers/``, where a file has the name of its method.
Other packages name theirs by entry points of the group ``vllm_specplus.methods``: the entry
point has the method's name, its value is ``"module:Class"``. Names are known without importing
anything; only the file of a method that is used is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from vllm_specplus.strict import quoted

GROUP = "vllm_specplus.methods"
_PROPOSERS = "vllm_specplus.proposers"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
#: Methods of vLLM's own, which these names keep meaning.
_VLLMS = re.compile(
    "ngram|ngram_gpu|medusa|mlp_speculator|draft_model|suffix|custom_class|eagle|eagle3"
    "|extract_hidden_states|dflash|dspark|(.*_)?mtp"
)

_Class = TypeVar("_Class", bound=type)
#: Classes whose modules have been imported.
_registered: dict[str, type] = {}


@dataclass(frozen=True, slots=True)
class Method:
    """A method that is installed; it may not have been imported."""

    name: str
    place: str
    """``"module:Class"``, or the module alone."""
    package: str
    """Distribution that brings it, with its version."""
    problem: str | None = None
    """Why it cannot be used, in one sentence."""


def register_method(proposer: _Class) -> _Class:
    """Class decorator: makes a proposer known by the method its ``config_class`` names.

    Raises ValueError, in one sentence, for a name that cannot be, or that another class has.
    """
    where = f"{proposer.__module__}:{proposer.__qualname__}"
    config = vars(proposer).get("config_class")
    fields = getattr(config, "model_fields", {})
    name = fields["method"].default if "method" in fields else None
    if not isinstance(name, str):
        raise ValueError(
            f"{where} names no method: give it a 'config_class' whose field 'method' has the "
            f"method's name as its default"
        )
    if problem := _problem_of(name):
        raise ValueError(f"{where}: {problem}")
    other = _registered.setdefault(name, proposer)
    if (other.__module__, other.__qualname__) != (proposer.__module__, proposer.__qualname__):
        raise ValueError(
            f"method {name!r} is registered twice, by {other.__module__}:{other.__qualname__} and "
            f"by {where}: rename one of them"
        )
    _registered[name] = proposer  # also after its module was reloaded
    return proposer


def methods() -> list[Method]:
    """All methods that are installed or registered, by name, with what is wrong with them."""
    places: dict[str, list[tuple[str, str]]] = {}
    for path in Path(__file__).with_name("proposers").glob("[a-z]*.py"):
        places[path.stem] = [(f"{_PROPOSERS}.{path.stem}", "vllm-specplus")]
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        places.setdefault(entry.name, []).append((entry.value, package))
    for name, proposer in _registered.items():
        if name not in places:
            where = f"{proposer.__module__}:{proposer.__qualname__}"
            places[name] = [(where, proposer.__module__.partition(".")[0])]
    found = []
    for name, given in sorted(places.items()):
        problem = _problem_of(name)
        if len(given) > 1:
            packages = " and ".join(package for _, package in given)
            problem = f"method {name!r} is registered twice, by {packages}: uninstall or rename one"
        found += [Method(name, place, package, problem) for place, package in given]
    return found


def _problem_of(name: str) -> str | None:
    if _VLLMS.fullmatch(name):
        return f"method {name!r} is vLLM's own: choose another name"
    if not _NAME.fullmatch(name):
        return (
            f"{name!r} cannot be the name of a method: use lower-case letters, digits and "
            f"underscores, a letter first"
        )
    return None


def is_vllms(name: str) -> bool:
    """Is it a method of vLLM's own, of the versions we know or of the one that is installed?"""
    if _VLLMS.fullmatch(name):
        return True
    from vllm.config.speculative import SpeculativeMethod

    return name in _members(SpeculativeMethod)


def _members(literal: Any) -> set[str]:
    """The strings of a Literal, which may hold others."""
    return set().union(
        *({arg} if isinstance(arg, str) else _members(arg) for arg in get_args(literal))
    )


def method_names() -> list[str]:
    """Names of all methods that are ours to answer for, sorted; imports nothing."""
    return list(dict.fromkeys(m.name for m in methods() if not _VLLMS.fullmatch(m.name)))


def config_class(name: Any) -> Any:
    """The configuration class of a method; ValueError also for what is no name at all."""
    return method_class(name if isinstance(name, str) else quoted(name)).config_class


@functools.cache
def method_class(name: str) -> Any:
    """The proposer class of a method; imports its module.

    Raises ValueError, in one sentence, if there is none or it cannot be used.
    """
    found = next((method for method in methods() if method.name == name), None)
    if found is None:
        raise ValueError(
            f"unknown method {quoted(name)}; vllm-specplus has {', '.join(method_names())}"
        )
    if found.problem:
        raise ValueError(found.problem)
    if name not in _registered:
        _import(found)
    return _registered[name]


def _import(method: Method) -> None:
    module, _, attribute = method.place.partition(":")
    try:
        loaded = importlib.import_module(module)
        proposer = getattr(loaded, attribute) if attribute else None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"method {method.name!r} of {method.package} cannot be imported from {method.place!r}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    registered = _registered.get(method.name)
    if registered is None or (attribute and registered is not proposer):
        raise ValueError(
            f"{method.place!r} of {method.package} does not register method {method.name!r}: "
            f"decorate its class with @register_method, and give the entry point the name that "
            f"its configuration has"
        )


def usable_methods(suits: Callable[[Any], bool]) -> list[str]:
    """Names of the methods whose configuration class ``suits``; imports all that can be.

    For telling users what there is instead; slow.
    """
    names = []
    for method in methods():
        try:
            fits = suits(config_class(method.name))
        except ValueError:
            continue
        if fits and method.name not in names:
            names.append(method.name)
    return names
