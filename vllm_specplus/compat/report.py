"""What a check against vLLM's source found."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, field

from vllm_specplus.compat.source import Class, Function, Index, Module


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing of ours that does not fit this vLLM."""

    place: str
    """``file:line`` in our package."""
    target: str
    """What of vLLM it is about."""
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.target}: {self.text}"


@dataclass
class Report:
    """What was checked, and what is wrong."""

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """How many imports, overrides, calls and attributes of vLLM were checked."""
    patches: list[tuple[str, str]] = field(default_factory=list)
    """What of vLLM we replace while it runs, and where: (target, ``file:line``)."""


class Ledger:
    """Notes what is checked and found, each once however often it is met."""

    def __init__(self, index: Index, package: str):
        self._folder = index.roots[package].parent
        self._checked: set[tuple] = set()
        self._problems: set[Problem] = set()
        self._patches: set[tuple[str, str]] = set()

    def checked(self, kind: str, module: Module, node: ast.AST, *what: str) -> None:
        """``kind`` is one of ``Report.counts``; ``what`` tells several in one line apart."""
        self._checked.add((kind, module.name, getattr(node, "lineno", 0), *what))

    def problem(self, module: Module, node: ast.AST, target: str, text: str) -> None:
        """``node`` of our ``module`` does not fit ``target``, something of vLLM."""
        self._problems.add(Problem(self._place(module, node), target, text))

    def patch(self, module: Module, node: ast.AST, target: str) -> None:
        """``node`` of our ``module`` replaces ``target``, something of vLLM."""
        self._patches.add((target, self._place(module, node)))

    def _place(self, module: Module, node: ast.AST) -> str:
        return f"{module.path.relative_to(self._folder)}:{getattr(node, 'lineno', 1)}"

    def report(self) -> Report:
        """All of it."""
        counts = Counter(kind for kind, *_ in self._checked)
        return Report(sorted(self._problems), dict(counts), sorted(self._patches))


def is_vllm(module: Module) -> bool:
    """Is it one of vLLM's modules, and not ours?"""
    return module.name.split(".")[0] == "vllm"


def builds_on_vllm(cls: Class) -> bool:
    """Is it a class of vLLM, or of ours with one among its bases?"""
    return any(is_vllm(each.module) for each in cls.mro)


def title(symbol: Class | Function | Module) -> str:
    """Dotted name of a symbol."""
    if isinstance(symbol, Module):
        return symbol.name
    owner = f"{symbol.owner.node.name}." if isinstance(symbol, Function) and symbol.owner else ""
    return f"{symbol.module.name}.{owner}{symbol.node.name}"
