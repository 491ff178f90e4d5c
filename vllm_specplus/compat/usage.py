"""All that this package takes from vLLM, checked against the source of one version of it.

Names that are imported, wherever the import stands; methods that are overridden and what is put in
their place from outside, by their signatures; calls, by their arguments; and attributes of vLLM's
objects, as far as annotations and assignments tell of what class they are.

An override that vLLM does not have any more looks like a method of our own. It is told by this: no
one calls it, neither vLLM nor we.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from vllm_specplus.compat.code import CodeCheck
from vllm_specplus.compat.family import Family
from vllm_specplus.compat.imports import check_imports
from vllm_specplus.compat.inference import Inference, Instance, Scope, Types
from vllm_specplus.compat.overrides import compare
from vllm_specplus.compat.report import Ledger, Report, is_vllm, title
from vllm_specplus.compat.source import Class, Function, Index, Module, last_name

#: What our parameters of these names are where they have no annotation.
PARAMETERS = {
    "attn_group": "vllm.v1.worker.utils:AttentionGroup",
    "common": "vllm.v1.attention.backend:CommonAttentionMetadata",
    "common_attn_metadata": "vllm.v1.attention.backend:CommonAttentionMetadata",
    "group": "vllm.v1.worker.utils:AttentionGroup",
    "kv_cache_config": "vllm.v1.kv_cache_interface:KVCacheConfig",
    "model_config": "vllm.config:ModelConfig",
    "parallel_config": "vllm.config:ParallelConfig",
    "request": "vllm.v1.request:Request",
    "sampling_metadata": "vllm.v1.sample.metadata:SamplingMetadata",
    "sampling_params": "vllm.sampling_params:SamplingParams",
    "scheduler_output": "vllm.v1.core.sched.output:SchedulerOutput",
    "spec_decode_metadata": "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
    "speculative_config": "vllm.config:SpeculativeConfig",
    "vllm_config": "vllm.config:VllmConfig",
}
#: Attributes of vLLM's objects that hold an object of ours.
OURS = {"drafter", "model_runner", "additional_config"}
#: What is reached by a name in the configuration, and so by no import.
BY_NAME = (
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
    "vllm.engine.arg_utils:EngineArgs.speculative_config",
    "vllm.engine.arg_utils:EngineArgs.scheduler_cls",
    "vllm.engine.arg_utils:EngineArgs.additional_config",
    "vllm.config:ParallelConfig.worker_cls",
)


def examine(
    vllm: Path, ours: Path, overlay: dict[str, str] | None = None, package: str = "vllm_specplus"
) -> Report:
    """Check the package in the folder ``ours`` against the vLLM in the folder ``vllm``.

    ``overlay`` replaces the text of modules, of either, by their dotted names.
    """
    index = Index({"vllm": vllm, package: ours}, overlay)
    modules = list(index.modules_of(package))
    family, ledger = Family(index, modules), Ledger(index, package)
    code, inference = CodeCheck(index, family, ledger), Inference(index)
    declared = {name: _instance(index, place) for name, place in PARAMETERS.items()}
    for place in BY_NAME:
        _check_by_name(place, index, ledger, modules[0])
    for module in modules:
        check_imports(module, index, ledger)
        code.check(Scope(inference, module, declared=declared), module.tree.body)
    classes = ClassCheck(code, inference, declared, frozenset(_names_read(modules)))
    for cls in family.classes:
        classes.check(cls)
    return ledger.report()


def _instance(index: Index, place: str) -> Types:
    module_name, _, name = place.partition(":")
    found = index.lookup(module_name, name)
    return (Instance(found[0]),) if len(found) == 1 and isinstance(found[0], Class) else None


def _check_by_name(place: str, index: Index, ledger: Ledger, module: Module) -> None:
    module_name, _, path = place.partition(":")
    head, *rest = path.split(".")
    found = index.lookup(module_name, head)
    owner = found[0] if len(found) == 1 else None
    if owner is None or (rest and not (isinstance(owner, Class) and owner.find(rest[0]))):
        ledger.problem(module, module.tree, place, "does not exist; a configuration names it")


class ClassCheck:
    """Checks the methods of our classes, and what they override."""

    def __init__(
        self, code: CodeCheck, inference: Inference, declared: dict[str, Types],
        read: frozenset[str],
    ):  # fmt: skip
        """``read``: attributes that anything of ours reads, other than by ``super()``."""
        self._code, self._inference = code, inference
        self._declared, self._read = declared, read

    def check(self, cls: Class) -> None:
        """A class of ours, in every class that is made with it."""
        for leaf in self._code.family.in_use(cls):
            stock = [c for c in leaf.mro if is_vllm(c.module)]
            for name, members in cls.members.items():
                for member in members:
                    if member.kind == "def":
                        self._check_method(leaf, stock, Function(cls.module, member.node, cls))
                if stock:
                    self._check_used(leaf, stock, cls, name)

    def _check_method(self, leaf: Class, stock: list[Class], function: Function) -> None:
        module, name = function.module, function.node.name
        around = Scope(self._inference, module, declared=self._declared)
        scope = Scope(self._inference, module, function.node, around, leaf, function.owner)
        self._code.check(scope, list(function.node.body))
        owner = next((c for c in stock if name in c.members), None)
        if owner is None or name.startswith("__"):
            return
        defs = [m.node for m in owner.members[name] if m.kind == "def"]
        if len(defs) == 1:
            theirs = Function(owner.module, defs[0], owner)
            compare(function, theirs, self._code.ledger, skip_self=True)

    def _check_used(self, leaf: Class, stock: list[Class], cls: Class, name: str) -> None:
        """Whatever a class adds to one of vLLM is there for vLLM, or read by us."""
        if leaf.opaque or name.startswith("__") or name in self._read:
            return
        if any(name in c.members for c in stock):
            return
        node = cls.members[name][0].node
        self._code.ledger.problem(
            cls.module, node if hasattr(node, "lineno") else cls.node,
            f"{title(stock[0])}.{name}",
            "is not there to be overridden, and nothing of ours uses it",
        )  # fmt: skip


def _names_read(modules: list[Module]) -> Iterator[str]:
    """Attributes that are read, and strings that may name one."""
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                called = node.value
                if not (isinstance(called, ast.Call) and last_name(called.func) == "super"):
                    yield node.attr
            elif isinstance(value := getattr(node, "value", None), str) and value.isidentifier():
                yield value
