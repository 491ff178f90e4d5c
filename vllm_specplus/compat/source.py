"""vLLM's source and ours as one index of modules, classes and functions, read and not run.

Nothing is imported, so a wheel of any version can be read on any machine.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Def = ast.FunctionDef | ast.AsyncFunctionDef

#: Bases that bring no attributes of their own that anybody would read.
BARE_BASES = frozenset({"ABC", "Generic", "Protocol", "object", "NamedTuple"})


@dataclass(frozen=True, slots=True)
class Binding:
    """One statement that gives a name of a module or a class its value."""

    node: Any
    """A definition, an ``alias`` of an import, or the assignment."""
    typing_only: bool = False
    """Does it stand under ``if TYPE_CHECKING``?"""
    source: ast.ImportFrom | None = None
    """The import that an ``alias`` is of; None: ``import x``."""


@dataclass(eq=False)
class Module:
    name: str
    path: Path
    tree: ast.Module
    bindings: dict[str, list[Binding]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    """Modules of which all names are imported."""

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def absolute(self, source: ast.ImportFrom) -> str:
        """Name of the module that ``from ... import`` of this one imports from."""
        if not source.level:
            return source.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - source.level + self.is_package]
        return ".".join(parts + ([source.module] if source.module else []))


@dataclass(frozen=True, slots=True)
class Member:
    """What a class says of one of its attributes."""

    node: Any
    """A definition, an annotation, or the value that is assigned."""
    kind: str
    """``def``, ``class``, ``annotation`` or ``value``."""
    method: Def | None = None
    """The method that assigns it, None: the class body."""


@dataclass(eq=False)
class Class:
    module: Module
    node: ast.ClassDef
    mro: list[Class] = field(default_factory=list)
    """This class and its bases in the order of look-up, as far as they are in the index."""
    opaque: bool = False
    """May it have attributes that cannot be seen here?"""
    members: dict[str, list[Member]] = field(default_factory=dict)
    """Of its own body."""

    def find(self, name: str, after: Class | None = None) -> tuple[Class, list[Member]] | None:
        """The first class, behind ``after`` if given, that has ``name``."""
        mro = self.mro[self.mro.index(after) + 1 :] if after else self.mro
        return next(((c, c.members[name]) for c in mro if name in c.members), None)

    def method(self, name: str, after: Class | None = None) -> Function | None:
        """The same where it is a method with one definition."""
        found = self.find(name, after)
        if found is None:
            return None
        defs = [m.node for m in found[1] if m.kind == "def"]
        return Function(found[0].module, defs[0], found[0]) if len(defs) == 1 else None

    @property
    def decorators(self) -> set[str]:
        return {last_name(each) for each in self.node.decorator_list}

    @property
    def base_names(self) -> set[str]:
        return {last_name(base) for c in self.mro for base in c.node.bases}


@dataclass(frozen=True)
class Function:
    module: Module
    node: Def
    owner: Class | None = None

    @property
    def decorators(self) -> set[str]:
        return {last_name(each) for each in self.node.decorator_list}


@dataclass(frozen=True)
class Value:
    """A name of a module that is neither class nor function."""

    module: Module
    node: ast.AST


@dataclass(frozen=True)
class Opaque:
    """A name that exists and of which no more is known, as one from another library."""


OPAQUE = Opaque()
Symbol = Class | Function | Value | Module | Opaque


class Index:
    """Modules below some folders.

    ``roots`` maps the name of a top-level package to its folder; ``overlay`` replaces the text of
    some modules, by their dotted names.
    """

    def __init__(self, roots: dict[str, Path], overlay: dict[str, str] | None = None):
        self.roots, self._overlay = roots, overlay or {}
        self._modules: dict[str, Module | None] = {}
        self._classes: dict[ast.ClassDef, Class] = {}

    def module(self, name: str) -> Module | None:
        """The module of this dotted name, None if there is none."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        top, *rest = name.split(".")
        if top not in self.roots:
            return None
        place = self.roots[top].joinpath(*rest)
        path = next(
            (p for p in (place / "__init__.py", place.with_suffix(".py")) if p.exists()), None
        )
        if path is None:
            # A package without a file of its own.
            return Module(name, place / "__init__.py", ast.parse("")) if place.is_dir() else None
        text = self._overlay.get(name) or path.read_text(encoding="utf-8")
        module = Module(name, path, ast.parse(text, str(path)))
        for binding_name, binding in _bindings(module.tree.body):
            if binding_name == "*" and binding.source:
                module.stars.append(module.absolute(binding.source))
            else:
                module.bindings.setdefault(binding_name, []).append(binding)
        return module

    def modules_of(self, package: str) -> Iterator[Module]:
        """All modules below a top-level package."""
        root = self.roots[package]
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            found = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            if found:
                yield found

    def lookup(
        self, module_name: str, name: str, typing: bool = True, seen: frozenset = frozenset()
    ) -> list[Symbol]:
        """What ``name`` of a module may be; nothing: it does not exist.

        ``typing``: names that exist for type checkers only count as well.
        """
        module = self.module(module_name)
        if module is None or (module_name, name) in seen:
            return []
        seen |= {(module_name, name)}
        found: list[Symbol] = []
        lazy = "__getattr__" in module.bindings
        for binding in module.bindings.get(name, ()):
            if typing or lazy or not binding.typing_only:
                found += self._follow(module, binding, typing, seen)
        for star in () if found else module.stars:
            found += self.lookup(star, name, typing, seen) if self.known(star) else [OPAQUE]
        if not found and (submodule := self.module(f"{module_name}.{name}")):
            found = [submodule]
        return found or ([OPAQUE] if name.startswith("__") else [])

    def known(self, module_name: str) -> bool:
        """Does the module belong to a package of the index?"""
        return module_name.split(".")[0] in self.roots

    def _follow(self, module: Module, binding: Binding, typing: bool, seen) -> list[Symbol]:
        node = binding.node
        if isinstance(node, ast.alias):
            if binding.source is None:
                name = node.name if node.asname else node.name.split(".")[0]
                if not self.known(name):
                    return [OPAQUE]
                found = self.module(name)
                return [found] if found else []
            origin = module.absolute(binding.source)
            if not self.known(origin):
                return [OPAQUE]
            return self.lookup(origin, node.name, typing or binding.typing_only, seen)
        if isinstance(node, ast.ClassDef):
            return [self.class_of(module, node)]
        if isinstance(node, Def):
            return [Function(module, node)]
        return [Value(module, node)]

    def class_of(self, module: Module, node: ast.ClassDef) -> Class:
        """The class that ``node`` defines."""
        if node in self._classes:
            return self._classes[node]
        self._classes[node] = found = Class(module, node)
        found.mro = [found]  # for a class that names itself among its bases
        found.members = _members(node)
        bases = []
        for base in node.bases:
            known = self._base(module, base)
            if known is not None:
                bases.append(known)
            elif last_name(base) not in BARE_BASES:
                found.opaque = True
        found.opaque |= any(base.opaque for base in bases) or "__getattr__" in found.members
        # What fits a protocol has more than it says.
        found.opaque |= any(last_name(base) == "Protocol" for base in node.bases)
        found.mro = [found, *_merge([*(list(base.mro) for base in bases), bases])]
        return found

    def _base(self, module: Module, base: ast.expr) -> Class | None:
        if isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name):
            found = self.lookup(module.name, base.id)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
            owners = self.lookup(module.name, base.value.id)
            if len(owners) != 1 or not isinstance(owners[0], Module):
                return None
            found = self.lookup(owners[0].name, base.attr)
        else:
            return None
        classes = [each for each in found if isinstance(each, Class)]
        return classes[0] if len(classes) == len(found) == 1 else None


def last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``, of a call or a subscript of it."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_typing_only(test: ast.expr) -> bool:
    return last_name(test) == "TYPE_CHECKING"


def targets(node: ast.expr) -> Iterator[ast.expr]:
    """The single targets of an assignment."""
    if isinstance(node, ast.Tuple | ast.List):
        for each in node.elts:
            yield from targets(each)
    elif isinstance(node, ast.Starred):
        yield from targets(node.value)
    else:
        yield node


def _bindings(body: list[ast.stmt], typing_only: bool = False) -> Iterator[tuple[str, Binding]]:
    """Names that statements bind, outside functions and classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | Def):
            yield node.name, Binding(node, typing_only)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, Binding(alias, typing_only, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], Binding(alias, typing_only)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for whole in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for target in targets(whole):
                    if isinstance(target, ast.Name):
                        yield target.id, Binding(node, typing_only)
        elif isinstance(node, ast.If):
            yield from _bindings(node.body, typing_only or is_typing_only(node.test))
            yield from _bindings(node.orelse, typing_only)
        else:
            for part in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(node, part, []), typing_only)
            for handler in getattr(node, "handlers", []):
                yield from _bindings(handler.body, typing_only)
            for target in targets(node.target) if isinstance(node, ast.For) else ():
                if isinstance(target, ast.Name):
                    yield target.id, Binding(node, typing_only)


def _members(node: ast.ClassDef) -> dict[str, list[Member]]:
    members: dict[str, list[Member]] = {}

    def add(name: str, *args) -> None:
        members.setdefault(name, []).append(Member(*args))

    for name, binding in _bindings(node.body):
        statement = binding.node
        if isinstance(statement, ast.ClassDef):
            add(name, statement, "class")
        elif isinstance(statement, Def):
            decorators = {last_name(each) for each in statement.decorator_list}
            if not decorators & {"overload", "setter", "deleter"}:
                add(name, statement, "def")
        elif isinstance(statement, ast.AnnAssign):
            add(name, statement.annotation, "annotation")
        else:
            add(name, getattr(statement, "value", statement), "value")
    methods = [m.node for group in list(members.values()) for m in group if m.kind == "def"]
    for method in methods:
        arguments = [*method.args.posonlyargs, *method.args.args]
        decorators = {last_name(each) for each in method.decorator_list}
        if arguments and not decorators & {"staticmethod", "classmethod"}:
            for name, *rest in _assigned(method, arguments[0].arg):
                add(name, *rest, method)
    slots = members.get("__slots__", ())
    for slot in (each for m in slots for each in ast.walk(m.node)):
        if isinstance(slot, ast.Constant) and isinstance(slot.value, str):
            members.setdefault(slot.value, []).append(Member(slot, "value"))
    return members


def _assigned(method: Def, own: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Attributes of ``self`` that a method gives a value: (name, node, kind)."""
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            for whole in node.targets:
                single = isinstance(whole, ast.Attribute)
                for target in targets(whole):
                    if name := _own_attribute(target, own):
                        yield name, node.value if single else ast.Pass(), "value"
        elif isinstance(node, ast.AnnAssign):
            if name := _own_attribute(node.target, own):
                yield name, node.annotation, "annotation"
        elif isinstance(node, ast.For | ast.AugAssign | ast.withitem):
            given = node.optional_vars if isinstance(node, ast.withitem) else node.target
            for target in targets(given) if given else ():
                if name := _own_attribute(target, own):
                    yield name, ast.Pass(), "value"


def _own_attribute(target: ast.expr, own: str) -> str | None:
    """``x`` of ``self.x``."""
    if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
        return None
    return target.attr if target.value.id == own else None


def _merge(sequences: list[list[Class]]) -> list[Class]:
    """Python's order of look-up (C3); where there is none, any."""
    merged: list[Class] = []
    sequences = [list(each) for each in sequences if each]
    while sequences:
        tails = {c for each in sequences for c in each[1:]}
        head = next((each[0] for each in sequences if each[0] not in tails), sequences[0][0])
        merged.append(head)
        sequences = [[c for c in each if c is not head] for each in sequences]
        sequences = [each for each in sequences if each]
    return merged
