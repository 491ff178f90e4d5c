"""Names that are imported from vLLM, wherever the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from vllm_specplus.compat.report import Ledger
from vllm_specplus.compat.source import Index, Module, is_typing_only, last_name

Missing = Iterator[tuple[str, str]]
IMPORT_ERRORS = {"ImportError", "ModuleNotFoundError", "Exception"}


def check_imports(module: Module, index: Index, ledger: Ledger) -> None:
    """Check all imports of one module of ours."""
    for statement in module.tree.body:
        for name, text, node in _missing(module, statement, index, ledger, typing=False):
            ledger.problem(module, node, name, text)


def _missing(module: Module, node: ast.AST, index: Index, ledger: Ledger, typing: bool):
    """What is imported in ``node`` and does not exist: (name, text, node)."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        for name, text in _missing_names(module, node, index, ledger, typing):
            yield name, text, node
    elif isinstance(node, ast.If) and is_typing_only(node.test):
        for part, under in ((node.body, True), (node.orelse, typing)):
            for each in part:
                yield from _missing(module, each, index, ledger, under)
    elif isinstance(node, ast.Try) and _catches_import_errors(node):
        ways = [node.body, *(handler.body for handler in node.handlers)]
        missing = [
            [m for each in way for m in _missing(module, each, index, ledger, typing)]
            for way in ways
        ]
        if all(missing):  # else there is a way that works
            yield from (each for way in missing for each in way)
    elif isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case | ast.Module):
        for child in ast.iter_child_nodes(node):
            yield from _missing(module, child, index, ledger, typing)


def _missing_names(
    module: Module, node: ast.Import | ast.ImportFrom, index: Index, ledger: Ledger, typing: bool
) -> Missing:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "vllm":
                ledger.checked("imports", module, node, alias.name)
                if index.module(alias.name) is None:
                    yield alias.name, "no such module"
        return
    origin = module.absolute(node)
    if origin.split(".")[0] != "vllm":
        return
    if index.module(origin) is None:
        yield origin, "no such module"
        return
    for alias in node.names:
        ledger.checked("imports", module, node, alias.name)
        if not index.lookup(origin, alias.name, typing):
            yield f"{origin}.{alias.name}", "does not exist"


def _catches_import_errors(node: ast.Try) -> bool:
    for handler in node.handlers:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if any(kind is None or last_name(kind) in IMPORT_ERRORS for kind in kinds):
            return True
    return False
