"""Attributes of vLLM's objects, calls of its functions, and what is put in their place."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache

from vllm_specplus.compat import signatures
from vllm_specplus.compat.family import Family
from vllm_specplus.compat.inference import (
    Bound,
    ClassObject,
    Container,
    Instance,
    Scope,
    Super,
    Type,
    last_name,
    walk_inside,
)
from vllm_specplus.compat.overrides import compare
from vllm_specplus.compat.report import Ledger, builds_on_vllm, is_vllm, title
from vllm_specplus.compat.source import Class, Def, Function, Index, Module, targets

#: Attributes of vLLM's objects that hold an object of ours.
OURS = {"additional_config", "drafter", "model_runner"}


class CodeCheck:
    """Checks expressions, wherever they stand."""

    def __init__(self, index: Index, family: Family, ledger: Ledger):
        self.index, self.family, self.ledger = index, family, ledger

    def check(self, scope: Scope, body: Iterable[ast.AST]) -> None:
        """Check statements, and functions in them; classes are checked as such."""
        for statement in body:
            for node in _looked_at(statement):
                if isinstance(node, ast.Attribute):
                    self._check_attribute(scope, node)
                elif isinstance(node, ast.Call):
                    self._check_call(scope, node)
                elif isinstance(node, ast.Assign):
                    self._check_patch(scope, node)
                elif isinstance(node, Def | ast.Lambda):
                    self._check_function(scope, node)

    def _check_function(self, around: Scope, node: Def | ast.Lambda) -> None:
        scope = Scope(around.inference, around.module, node, around)
        self.check(scope, [node.body] if isinstance(node, ast.Lambda) else node.body)

    def _check_attribute(self, scope: Scope, node: ast.Attribute) -> None:
        types = scope.type_of(node.value)
        if not types or not any(self._theirs(each) for each in types):
            return
        if isinstance(node.value, ast.Attribute) and node.value.attr in OURS:
            return
        target = f"{title(_of_vllm(types[0]))}.{node.attr}"
        self.ledger.checked("attributes", scope.module, node, target)
        if not any(self._has(each, node.attr) for each in types):
            self.ledger.problem(scope.module, node, target, "does not exist")

    def _theirs(self, each: Type) -> bool:
        """Is it of vLLM, or of a class of ours that builds on one of vLLM?"""
        if isinstance(each, Module):
            return is_vllm(each)
        if isinstance(each, Instance | ClassObject | Super):
            return builds_on_vllm(each.cls)
        return False

    def _has(self, owner: Type, name: str) -> bool:
        if isinstance(owner, Module):
            return bool(self.index.lookup(owner.name, name))
        if isinstance(owner, Bound | Container):
            return True
        cls, after = owner.cls, owner.after if isinstance(owner, Super) else None
        if cls.opaque or name.startswith("__") or cls.find(name, after):
            return True
        if _is_enum(cls) and name in ("name", "value"):
            return True
        if "NamedTuple" in cls.base_names and name.startswith("_"):
            return True
        # What vLLM gives may be an object of a class of ours.
        return after is None and any(name in c.members for c in self.family.built_on(cls))

    def _check_call(self, scope: Scope, node: ast.Call) -> None:
        if last_name(node.func) == "replace" and len(node.args) == 1:
            self._check_replace(scope, node)
        types = scope.type_of(node.func)
        if not types or len(types) != 1:
            return
        target, signature = self._signature(types[0])
        if signature is None:
            return
        self.ledger.checked("calls", scope.module, node, target)
        if text := signatures.problem_of_call(node, signature):
            self.ledger.problem(scope.module, node, target, text)

    def _check_replace(self, scope: Scope, node: ast.Call) -> None:
        """``dataclasses.replace`` of an object of vLLM."""
        types = scope.type_of(node.args[0])
        if not types or not all(isinstance(t, Instance) and self._theirs(t) for t in types):
            return
        self.ledger.checked("calls", scope.module, node, "replace")
        classes = [t.cls for t in types if isinstance(t, Instance)]
        known = {name for cls in classes for name in signatures.fields(cls)}
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in known:
                target = f"{title(classes[0])}.{keyword.arg}"
                self.ledger.problem(scope.module, keyword.value, target, "is no field to replace")

    def _signature(self, called: Type) -> tuple[str, signatures.Signature | None]:
        """Name and signature of what is called, if it is vLLM's."""
        if isinstance(called, Instance):
            found = called.cls.method("__call__") or called.cls.method("forward")
            called = Bound(found, bound=True) if found else called
        if isinstance(called, ClassObject) and self._theirs(called) and not _is_enum(called.cls):
            init = called.cls.find("__init__")
            if init and not is_vllm(init[0].module):
                return "", None
            return title(called.cls), signatures.of_class(called.cls)
        if isinstance(called, Bound) and is_vllm(called.function.module):
            return title(called.function), signatures.bound(called.function, called.bound)
        return "", None

    def _check_patch(self, scope: Scope, node: ast.Assign) -> None:
        """An assignment that replaces something of a module, class or table of vLLM."""
        for target in (each for whole in node.targets for each in targets(whole)):
            entry = target.value if isinstance(target, ast.Subscript) else None
            if isinstance(entry, ast.Name) and (table := scope.origin(entry.id)):
                self.ledger.patch(scope.module, target, f"{table}[...]")
            if not isinstance(target, ast.Attribute):
                continue
            types = scope.type_of(target.value)
            if not types or len(types) != 1 or not self._theirs(types[0]):
                continue
            owner = types[0]
            if isinstance(owner, Module):
                self.ledger.patch(scope.module, target, f"{owner.name}.{target.attr}")
            elif isinstance(owner, ClassObject) and owner.cls.module.name.startswith("vllm."):
                self.ledger.patch(scope.module, target, f"{title(owner.cls)}.{target.attr}")
                theirs, given = owner.cls.method(target.attr), scope.type_of(node.value)
                if theirs and given and isinstance(given[0], Bound):
                    ours = Function(scope.module, given[0].function.node)
                    compare(ours, theirs, self.ledger, skip_self=False)


@cache
def _looked_at(statement: ast.AST) -> list[ast.AST]:
    """What is checked in a statement, which is met once for every class that has it."""
    kinds = ast.Attribute | ast.Call | ast.Assign | Def | ast.Lambda
    return [node for node in walk_inside(statement) if isinstance(node, kinds)]


def _of_vllm(owner: Type) -> Class | Module:
    """What of vLLM ``owner`` is, or builds on."""
    assert not isinstance(owner, Bound | Container)
    if isinstance(owner, Module):
        return owner
    return next((c for c in owner.cls.mro if is_vllm(c.module)), owner.cls)


def _is_enum(cls: Class) -> bool:
    return bool({"Enum", "IntEnum", "StrEnum", "IntFlag"} & cls.base_names)
