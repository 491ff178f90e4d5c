"""A function of ours in the place of one of vLLM, by its signature."""

from __future__ import annotations

from vllm_specplus.compat import signatures
from vllm_specplus.compat.report import Ledger, title
from vllm_specplus.compat.source import Function


def compare(ours: Function, theirs: Function, ledger: Ledger, skip_self: bool) -> None:
    """A function of ours that stands where one of vLLM stood."""
    target = title(theirs)
    ledger.checked("overrides", ours.module, ours.node, target)
    kinds = {"staticmethod", "classmethod", "property", "cached_property"}
    mine, stock = ours.decorators & kinds, theirs.decorators & kinds
    if skip_self and mine != stock and not {*mine, *stock} <= {"property", "cached_property"}:
        kind = f"is {_kind(stock)} and overridden by {_kind(mine)}"
        ledger.problem(ours.module, ours.node, target, kind)
        return
    skip = skip_self and "staticmethod" not in stock
    text = signatures.problem_of_override(
        signatures.bound(ours, skip), signatures.bound(theirs, skip)
    )
    if text:
        ledger.problem(ours.module, ours.node, target, f"our override does not fit: {text}")


def _kind(decorators: set[str]) -> str:
    return f"a {next(iter(decorators))}" if decorators else "a method"
