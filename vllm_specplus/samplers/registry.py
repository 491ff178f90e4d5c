"""Every acceptance rule by its name. Importing this imports no rule, and not torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_specplus.samplers.rules import Rule

#: Name -> module of this package and class.
_CLASSES = {
    "block": "sampled:Block",
    "gsd": "relaxed_sampling:Gsd",
    "judge": "relaxed:Judge",
    "k_seq": "sampled:KSeq",
    "kl_judge": "relaxed_sampling:KlJudge",
    "lantern": "relaxed_sampling:Lantern",
    "lantern++": "relaxed_sampling:LanternPlus",
    "lossless": "lossless:Lossless",
    "synthetic": "synthetic:Synthetic",
    "top_k_margin": "relaxed:TopKMargin",
    "traversal": "sampled:Traversal",
    "typical": "relaxed:Typical",
    "with_replacement": "sampled:WithReplacement",
    "without_replacement": "sampled:WithoutReplacement",
}


def rule_names() -> list[str]:
    """Lists the names of all rules, sorted."""
    return sorted(_CLASSES)


def rule_class(name: str) -> type[Rule]:
    """Finds the class of a rule; ValueError if there is none of this name."""
    if name not in _CLASSES:
        raise ValueError(
            f"there is no acceptance rule {name!r} (allowed: {', '.join(rule_names())})"
        )
    module, attribute = _CLASSES[name].split(":")
    return getattr(importlib.import_module(f"vllm_specplus.samplers.{module}"), attribute)


def make_rule(name: str, keys: Mapping[str, Any], **given: Any) -> Rule:
    """Builds a rule from the ``keys`` that a user may set, and from those of the things ``given``
    (``codebook``, ``embeddings``, ``device``) that its class ``needs``."""
    cls = rule_class(name)
    return cls(**keys, **{need: given[need] for need in cls.needs})
