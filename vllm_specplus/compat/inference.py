"""What an expression of our source is, where vLLM's annotations and assignments tell.

An unknown type is None: whatever cannot be told is not checked, so what is reported is certain.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm_specplus.compat.source import (
    Class,
    Def,
    Function,
    Index,
    Member,
    Module,
    Value,
    last_name,
    targets,
)


@dataclass(frozen=True)
class Instance:
    cls: Class


@dataclass(frozen=True)
class ClassObject:
    cls: Class


@dataclass(frozen=True)
class Bound:
    """A function, whose first argument may be taken already."""

    function: Function
    bound: bool


@dataclass(frozen=True)
class Super:
    """``super()``: what the class of ``self`` has behind ``after``."""

    cls: Class
    after: Class


@dataclass(frozen=True)
class Container:
    """What holds elements of one type; of a mapping, its values."""

    element: Types
    mapping: bool = False


Type = Instance | ClassObject | Bound | Super | Container | Module
Types = tuple[Type, ...] | None

SEQUENCES = {"list", "List", "tuple", "Tuple", "set", "Sequence", "Iterable", "Iterator", "deque"}
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "OrderedDict"}
TRANSPARENT = {"Optional", "Annotated", "SkipValidation", "ClassVar", "Final", "InitVar"}
#: Calls that return what they are given.
SAME = {"list", "sorted", "tuple", "reversed", "iter", "copy", "deepcopy", "replace", "cast"}


def union(parts: list[Types]) -> Types:
    """One of several types; unknown if one is."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return tuple(dict.fromkeys(each for part in known for each in part))


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


class Inference:
    """Types of annotations, names of modules and attributes of classes."""

    def __init__(self, index: Index):
        self.index = index
        self._members: dict = {}

    def annotation(self, node: ast.expr | None, module: Module) -> Types:
        """Type of what is annotated so."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                node = ast.parse(node.value, mode="eval").body
            except SyntaxError:
                return None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._union(node.left, node.right, module=module)
        if isinstance(node, ast.Subscript):
            return self._subscripted(node, module)
        if isinstance(node, ast.Name | ast.Attribute):
            return self._named(node, module)
        return None

    def _union(self, *nodes: ast.expr, module: Module) -> Types:
        return union([self.annotation(node, module) for node in nodes if not is_none(node)])

    def _subscripted(self, node: ast.Subscript, module: Module) -> Types:
        name = last_name(node.value)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name in TRANSPARENT:
            return self.annotation(inner[0], module)
        if name == "Union":
            return self._union(*inner, module=module)
        if name in SEQUENCES:
            kinds = [each for each in inner if not is_ellipsis(each)]
            element = self.annotation(kinds[0], module) if len(kinds) == 1 else None
            return (Container(element),) if element else None
        if name in MAPPINGS and len(inner) == 2:
            element = self.annotation(inner[1], module)
            return (Container(element, mapping=True),) if element else None
        if name == "type":
            found = self.annotation(inner[0], module)
            return tuple(ClassObject(t.cls) for t in found or () if isinstance(t, Instance)) or None
        return self.annotation(node.value, module)

    def _named(self, node: ast.Name | ast.Attribute, module: Module) -> Types:
        if isinstance(node, ast.Name):
            found = self.index.lookup(module.name, node.id)
        else:
            owner = self.named(node.value.id, module) if isinstance(node.value, ast.Name) else None
            if not owner or not isinstance(owner[0], Module):
                return None
            found = self.index.lookup(owner[0].name, node.attr)
        if len(found) != 1:
            return None
        symbol = found[0]
        if isinstance(symbol, Class):
            return (Instance(symbol),)
        if isinstance(symbol, Value) and isinstance(symbol.node, ast.Assign | ast.AnnAssign):
            value = symbol.node.value  # an alias of types
            if isinstance(value, ast.BinOp | ast.Subscript | ast.Name) and value is not node:
                return self.annotation(value, symbol.module)
        return None

    def named(self, name: str, module: Module) -> Types:
        """Type of a name of a module."""
        found = self.index.lookup(module.name, name)
        return self.of_symbol(found[0]) if len(found) == 1 else None

    def of_symbol(self, symbol) -> Types:
        """Type of what a name stands for."""
        if isinstance(symbol, Module):
            return (symbol,)
        if isinstance(symbol, Class):
            return (ClassObject(symbol),)
        if isinstance(symbol, Function):
            return (Bound(symbol, bound=False),)
        if isinstance(symbol, Value) and isinstance(symbol.node, ast.AnnAssign):
            return self.annotation(symbol.node.annotation, symbol.module)
        assigned = isinstance(symbol, Value) and isinstance(symbol.node, ast.Assign)
        if assigned and isinstance(symbol.node.value, ast.Call):
            return Scope(self, symbol.module).type_of(symbol.node.value)
        return None

    def returned(self, function: Function) -> Types:
        """Type of what a call of the function gives."""
        if function.decorators & {"contextmanager", "asynccontextmanager"}:
            return None
        return self.annotation(function.node.returns, function.module)

    def attribute(self, cls: Class, name: str, after: Class | None, on_class: bool) -> Types:
        """Type of attribute ``name``, which the class has."""
        key = cls, name, after, on_class
        if key not in self._members:
            self._members[key] = None  # of what is defined by itself
            self._members[key] = self._attribute(*key)
        return self._members[key]

    def _attribute(self, cls: Class, name: str, after: Class | None, on_class: bool) -> Types:
        start = cls.mro.index(after) + 1 if after else 0
        owners = [c for c in cls.mro[start:] if name in c.members]
        first = owners[0]
        members = first.members[name]
        defs = [m for m in members if m.kind == "def"]
        if defs:
            return self._method(Function(first.module, defs[0].node, first), on_class)
        if members[0].kind == "class":
            return (ClassObject(self.index.class_of(first.module, members[0].node)),)
        for owner in owners:
            for member in owner.members[name]:
                if member.kind == "annotation":
                    return self._annotated(member, owner)
        values = [(o, m) for o in owners for m in o.members[name] if not is_none(m.node)]
        if any(not isinstance(m.node, ast.expr) for _, m in values):
            return None
        return union([self._assigned(owner, member, cls) for owner, member in values])

    def _annotated(self, member: Member, owner: Class) -> Types:
        return self.annotation(member.node, owner.module)

    def _assigned(self, owner: Class, member: Member, cls: Class) -> Types:
        scope = Scope(self, owner.module)
        if member.method is not None:
            scope = Scope(self, owner.module, member.method, scope, cls, owner)
        return scope.type_of(member.node)

    def _method(self, function: Function, on_class: bool) -> Types:
        if function.decorators & {"property", "cached_property"}:
            return None if on_class else self.returned(function)
        bound = "staticmethod" not in function.decorators
        if on_class and "classmethod" not in function.decorators:
            bound = False
        return (Bound(function, bound),)


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


Source = tuple[str, Any]


class Names:
    """What the names of one function are given: (kind, node) of each time they are given it."""

    def __init__(self, node: Def | ast.Lambda, is_method: bool):
        self.sources: dict[str, list[Source]] = {}
        self.tested: dict[str, list[ast.expr]] = {}
        """Classes of which names are tested to be an instance."""
        self._read_arguments(node, is_method)
        for each in walk_function(node):
            self._read(each)

    def _read_arguments(self, node: Def | ast.Lambda, is_method: bool) -> None:
        arguments = node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        decorators = {last_name(each) for each in getattr(node, "decorator_list", ())}
        for i, argument in enumerate([*positional, *arguments.kwonlyargs]):
            if i == 0 and is_method and "staticmethod" not in decorators:
                kind = "class" if "classmethod" in decorators else "self"
                self._add(argument.arg, kind, None)
            elif argument.annotation is not None:
                self._add(argument.arg, "annotation", argument.annotation)
            else:
                self._add(argument.arg, "parameter", None)
        for rest in (arguments.vararg, arguments.kwarg):
            if rest:
                self._add(rest.arg, "opaque", None)

    def _add(self, name: str, kind: str, node: object) -> None:
        self.sources.setdefault(name, []).append((kind, node))

    def _read(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for whole in node.targets:
                self._assign(whole, "value", node.value)
        elif isinstance(node, ast.AnnAssign):
            self._assign(node.target, "annotation", node.annotation)
        elif isinstance(node, ast.AugAssign):
            self._assign(node.target, "opaque", None)
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target, "value", node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._assign(node.target, "element", node.iter)
        elif isinstance(node, ast.withitem) and node.optional_vars:
            self._assign(node.optional_vars, "opaque", None)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            self._add(node.name, "opaque", None)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                kind = "from" if isinstance(node, ast.ImportFrom) else "import"
                self._add(alias.asname or alias.name.split(".")[0], kind, (node, alias))
        elif isinstance(node, ast.ClassDef | Def):
            self._add(node.name, "local", node)
        elif isinstance(node, ast.Call) and last_name(node.func) == "isinstance":
            tested, cls = node.args
            if isinstance(tested, ast.Name):
                self.tested.setdefault(tested.id, []).append(cls)

    def _assign(self, target: ast.expr, kind: str, node: object) -> None:
        if isinstance(target, ast.Name):
            self._add(target.id, kind, node)
            return
        for each in targets(target):
            if isinstance(each, ast.Name):
                self._add(each.id, "opaque", None)


@cache
def _names(node: Def | ast.Lambda, is_method: bool) -> Names:
    return Names(node, is_method)


class Scope:
    """The names of one function, of its own and of those around it."""

    def __init__(
        self,
        inference: Inference,
        module: Module,
        node: Def | ast.Lambda | None = None,
        around: Scope | None = None,
        cls: Class | None = None,
        owner: Class | None = None,
        declared: dict[str, Types] | None = None,
    ):
        """``cls``: the class of ``self``, of which ``owner`` defines the function. ``declared``:
        types of parameters by name where no annotation tells."""
        self.inference, self.module, self.around = inference, module, around
        self.cls, self.owner = cls, owner
        if around is not None and cls is None:
            self.cls, self.owner = around.cls, around.owner
        self._declared = declared if declared is not None else getattr(around, "_declared", {})
        names = _names(node, cls is not None) if node is not None else None
        self._sources = names.sources if names else {}
        self._tested = names.tested if names else {}
        self._types: dict[str, Types] = {}

    def name(self, name: str) -> Types:
        """Type of a name as it is seen from here."""
        if name not in self._sources:
            if self.around is not None:
                return self.around.name(name)
            return self.inference.named(name, self.module)
        if name not in self._types:
            self._types[name] = None  # while it is being told
            self._types[name] = self._name(name)
        return self._types[name]

    def origin(self, name: str) -> str | None:
        """Whence in vLLM a name was imported, as ``module.name``."""
        for kind, node in self._sources.get(name, ()):
            if kind == "from" and self.module.absolute(node[0]).startswith("vllm."):
                return f"{self.module.absolute(node[0])}.{node[1].name}"
        return None

    def _name(self, name: str) -> Types:
        if tested := self._tested.get(name):
            return self.inference.annotation(tested[0], self.module) if len(tested) == 1 else None
        kinds = [(kind, node) for kind, node in self._sources[name] if not is_none(node)]
        return union([self._source(name, kind, node) for kind, node in kinds])

    def _source(self, name: str, kind: str, node) -> Types:
        if kind in ("self", "class"):
            assert self.cls is not None
            return (Instance(self.cls) if kind == "self" else ClassObject(self.cls),)
        if kind == "parameter":
            return self._declared.get(name)
        if kind == "annotation":
            return self.inference.annotation(node, self.module)
        if kind == "value":
            return self.type_of(node)
        if kind == "element":
            return self._element(node)
        if kind in ("from", "import"):
            return self._imported(*node)
        if kind == "local" and isinstance(node, Def):
            return (Bound(Function(self.module, node), bound=False),)
        return None

    def _imported(self, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> Types:
        index = self.inference.index
        if isinstance(node, ast.Import):
            found = index.module(alias.name if alias.asname else alias.name.split(".")[0])
            return (found,) if found else None
        symbols = index.lookup(self.module.absolute(node), alias.name)
        return self.inference.of_symbol(symbols[0]) if len(symbols) == 1 else None

    def _element(self, node: ast.expr) -> Types:
        """Type of what a loop over ``node`` gives."""
        types = self.type_of(node)
        if types and len(types) == 1 and isinstance(types[0], Container) and not types[0].mapping:
            return types[0].element
        return None

    def type_of(self, node: ast.AST) -> Types:
        """Type of an expression."""
        handler = getattr(self, f"_of_{type(node).__name__}", None)
        return handler(node) if handler else None

    def _of_Name(self, node: ast.Name) -> Types:
        return self.name(node.id)

    def _of_Await(self, node: ast.Await) -> Types:
        return self.type_of(node.value)

    def _of_NamedExpr(self, node: ast.NamedExpr) -> Types:
        return self.type_of(node.value)

    def _of_IfExp(self, node: ast.IfExp) -> Types:
        return union([self.type_of(n) for n in (node.body, node.orelse) if not is_none(n)])

    def _of_BoolOp(self, node: ast.BoolOp) -> Types:
        values = node.values[-1:] if isinstance(node.op, ast.And) else node.values
        return union([self.type_of(n) for n in values if not is_none(n)])

    def _of_Subscript(self, node: ast.Subscript) -> Types:
        types = self.type_of(node.value)
        if types and len(types) == 1 and isinstance(types[0], Container):
            return types if isinstance(node.slice, ast.Slice) else types[0].element
        return None

    def _of_ListComp(self, node: ast.ListComp) -> Types:
        element = self.type_of(node.elt)
        return (Container(element),) if element else None

    def _of_Attribute(self, node: ast.Attribute) -> Types:
        types = self.type_of(node.value)
        return union([self._attribute(each, node.attr) for each in types]) if types else None

    def _attribute(self, owner: Type, name: str) -> Types:
        inference = self.inference
        if isinstance(owner, Module):
            found = inference.index.lookup(owner.name, name)
            return inference.of_symbol(found[0]) if len(found) == 1 else None
        if isinstance(owner, Super) and owner.cls.find(name, owner.after):
            return inference.attribute(owner.cls, name, owner.after, False)
        if isinstance(owner, Instance | ClassObject) and owner.cls.find(name):
            return inference.attribute(owner.cls, name, None, isinstance(owner, ClassObject))
        return None

    def _of_Call(self, node: ast.Call) -> Types:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "super" and not node.args and self.cls and self.owner:
            return (Super(self.cls, self.owner),)
        if name == "next" and node.args:
            return self._element(node.args[0])
        if last_name(node.func) in SAME and node.args and name not in self._sources:
            return self.type_of(node.args[-1 if name == "cast" else 0]) if name != "cast" else None
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "get", "pop"):
            held = self.type_of(node.func.value)
            if held and len(held) == 1 and isinstance(held[0], Container) and held[0].mapping:
                values = node.func.attr == "values"
                return (Container(held[0].element),) if values else held[0].element
        types = self.type_of(node.func)
        return union([self._called(each) for each in types]) if types else None

    def _called(self, called: Type) -> Types:
        if isinstance(called, ClassObject):
            return (Instance(called.cls),)
        if isinstance(called, Bound):
            return self.inference.returned(called.function)
        return None


def walk_function(node: Def | ast.Lambda) -> Iterator[ast.AST]:
    """All nodes of a function's body but those inside of functions and classes in it, whose own
    nodes come along."""
    if isinstance(node, ast.Lambda):
        yield from walk_inside(node.body)
        return
    for each in node.body:
        yield from walk_inside(each)


def walk_inside(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what is in it, but not what is inside of functions and classes in it."""
    yield node
    if isinstance(node, Def | ast.Lambda | ast.ClassDef):
        return
    for child in ast.iter_child_nodes(node):
        yield from walk_inside(child)
