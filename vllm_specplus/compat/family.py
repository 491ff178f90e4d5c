"""Which classes of ours build on which."""

from __future__ import annotations

import ast
from functools import cached_property

from vllm_specplus.compat.report import builds_on_vllm
from vllm_specplus.compat.source import Class, Index, Module


class Family:
    """The classes of this package, also those that stand in functions."""

    def __init__(self, index: Index, modules: list[Module]):
        self.classes = [
            index.class_of(module, node)
            for module in modules
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef)
        ]

    @cached_property
    def _over(self) -> dict[Class, list[Class]]:
        over: dict[Class, list[Class]] = {}
        for each in self.classes:
            for base in each.mro:
                over.setdefault(base, []).append(each)
        return over

    def built_on(self, cls: Class) -> list[Class]:
        """Classes of ours that build on ``cls``, with itself if it is ours."""
        return self._over.get(cls, [])

    def in_use(self, cls: Class) -> list[Class]:
        """Those of them that build on vLLM too, so what a mixin's ``self`` may be; ``cls`` alone
        if there are none."""
        return [c for c in self.built_on(cls) if builds_on_vllm(c)] or [cls]
