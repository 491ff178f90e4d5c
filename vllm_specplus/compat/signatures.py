"""Does a call, or an override, fit a signature?"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from vllm_specplus.compat.source import Class, Def, Function

#: What makes a class take its fields as arguments.
FIELD_DECORATORS = {"dataclass", "config", "pydantic_dataclass"}
FIELD_BASES = {"NamedTuple", "Struct", "BaseModel"}


@dataclass(frozen=True, slots=True)
class Signature:
    """Parameters behind ``self``."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    required: frozenset[str]
    positional_only: int = 0
    more_positional: bool = False
    more_keywords: bool = False

    @classmethod
    def of(cls, node: Def, skip: int) -> Signature:
        """Of a function, without its first ``skip`` parameters."""
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args]
        without_default = every[: len(every) - len(arguments.defaults)]
        required = {argument.arg for argument in without_default[skip:]}
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if default is None:
                required.add(argument.arg)
        return cls(
            tuple(argument.arg for argument in every[skip:]),
            tuple(argument.arg for argument in arguments.kwonlyargs),
            frozenset(required),
            max(len(arguments.posonlyargs) - skip, 0),
            arguments.vararg is not None,
            arguments.kwarg is not None,
        )

    @property
    def names(self) -> set[str]:
        return {*self.positional[self.positional_only :], *self.keyword_only}


def bound(function: Function, is_bound: bool) -> Signature:
    """What a call of ``function`` has to give."""
    return Signature.of(function.node, int(is_bound))


def of_class(cls: Class) -> Signature | None:
    """What making an object of ``cls`` has to give; None: unknown."""
    owner_of_init = cls.find("__init__")
    taking = next((c for c in cls.mro if c.decorators & FIELD_DECORATORS), None)
    by_base = FIELD_BASES & cls.base_names
    if taking is None and not by_base:
        init = cls.method("__init__")
        return bound(init, True) if init is not None and not cls.find("__new__") else None
    if owner_of_init and taking and cls.mro.index(owner_of_init[0]) <= cls.mro.index(taking):
        init = cls.method("__init__")
        return bound(init, True) if init else None
    return Signature((), tuple(fields(cls)), frozenset(), more_positional=True)


def fields(cls: Class) -> dict[str, ast.AST]:
    """Fields of a class that takes them as arguments, in order."""
    found: dict[str, ast.AST] = {}
    for each in reversed(cls.mro):
        for name, members in each.members.items():
            for member in members:
                if member.kind == "annotation" and member.method is None:
                    found[name] = member.node
    return found


def problem_of_call(node: ast.Call, signature: Signature) -> str | None:
    """Why a call does not fit, or None."""
    starred = any(isinstance(each, ast.Starred) for each in node.args)
    spread = any(each.arg is None for each in node.keywords)
    given = [each.arg for each in node.keywords if each.arg]
    if not signature.more_keywords:
        unknown = [name for name in given if name not in signature.names]
        if unknown:
            return f"it has no parameter {unknown[0]!r}"
    most = len(signature.positional)
    if not starred and not signature.more_positional and len(node.args) > most:
        return f"it takes {most} positional arguments, {len(node.args)} are given"
    taken = set(given) | set(signature.positional[: len(node.args)])
    missing = [name for name in signature.required if name not in taken]
    if missing and not starred and not spread:
        return f"its parameter {sorted(missing)[0]!r} is not given"
    return None


def problem_of_override(ours: Signature, theirs: Signature) -> str | None:
    """Why a call that fits ``theirs`` may not fit ``ours``, or None."""
    for i, name in enumerate(theirs.positional):
        if i < len(ours.positional):
            if ours.positional[i] != name and i >= theirs.positional_only:
                return f"its parameter {i + 1} is {name!r}, ours {ours.positional[i]!r}"
        elif not ours.more_positional:
            return f"its parameter {name!r} is none of ours"
        elif not ours.more_keywords and name not in ours.keyword_only:
            return f"its parameter {name!r} may be given by keyword, which ours does not take"
    for name in theirs.keyword_only:
        if name not in ours.names and not ours.more_keywords:
            return f"its parameter {name!r} is none of ours"
    known = {*theirs.positional, *theirs.keyword_only}
    extra = [name for name in ours.required if name not in known]
    if extra:
        return f"it has no parameter {sorted(extra)[0]!r}, which ours requires"
    if (theirs.more_positional, theirs.more_keywords) > (ours.more_positional, ours.more_keywords):
        return "it takes arguments that ours does not"
    return None
