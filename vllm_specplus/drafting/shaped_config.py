"""Keys that the methods share which draft trees of a shape, level by level."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from vllm_specplus.config import MethodConfig
from vllm_specplus.drafting.shapes import CATERPILLAR_LEAST
from vllm_specplus.drafting.stop_config import NoStop, StopConfig
from vllm_specplus.strict import quoted

_SHAPE_KEYS = {
    "width": ("topk", "rsd_s", "spectr"),
    "branching": ("rsd_c",),
    "static_tree": ("static",),
}
#: Shapes whose nodes one key says.
_SIZED_BY = {"rsd_c": "branching", "static": "static_tree"}
#: shape -> what a user may call its verification -> the rule; the first is the default.
_RULES: dict[str, dict[str, str]] = {
    "chain": {"block": "block", "recursive": "without_replacement"},
    "topk": {},
    "rsd_c": {"traversal": "traversal", "recursive": "without_replacement"},
    "rsd_s": {"traversal": "traversal", "recursive": "without_replacement"},
    "static": {"traversal": "traversal", "recursive": "without_replacement"},
    "spectr": {"k_seq": "k_seq", "recursive": "with_replacement"},
    "caterpillar": {"recursive": "without_replacement"},
}
#: Shapes that go on from one node of a level, whose drafts a stop may end: what is below a node of
#: the others must not depend on what was drawn beside it.
_STOPPED = ("chain", "caterpillar")
#: Shapes that draw by a rule which also takes nodes that nothing drew.
_FUSED_SHAPES = tuple(
    shape for shape, rules in _RULES.items() if rules.get("recursive") == "without_replacement"
)


class ShapedDraftConfig(MethodConfig):
    """Keys of the methods that draft level by level, each level a forward pass."""

    own_size: ClassVar[bool] = True
    knows_next: ClassVar[bool] = True
    stops: ClassVar[frozenset[str]] = frozenset({"confidence", "adaptive_confidence"})
    """Rules that may end its drafts."""

    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 12
    """Nodes of the whole tree: width times depth, or given by ``branching``."""
    shape: Literal["chain", "topk", "rsd_c", "rsd_s", "spectr", "caterpillar"] = "topk"
    width: Annotated[int, Field(ge=1, le=16)] = 3
    """Nodes per level of topk, rsd_s and spectr."""
    branching: list[Annotated[int, Field(ge=1, le=16)]] = Field(
        default=[3, 1, 1, 1], min_length=1, max_length=80
    )
    """Children of every node, level by level, of rsd_c."""
    verification: Literal["recursive", "block", "traversal", "k_seq"] | None = None
    """How sampled nodes are accepted; by default the best rule for the shape."""
    stop: Annotated[StopConfig, Field(discriminator="rule")] = NoStop()
    """What ends a draft before the levels that the controller has planned."""

    @model_validator(mode="after")
    def _shape_fits(self):
        for key, shapes in _SHAPE_KEYS.items():
            if key in self.model_fields_set and self.shape not in shapes:
                raise ValueError(f"shape {self.shape!r} has no {key!r}: remove it")
        nodes = sum(self.levels())
        key = _SIZED_BY.get(self.shape)
        if key is not None and self.num_speculative_tokens != nodes:
            raise ValueError(
                f"{key!r} {quoted(getattr(self, key))} makes {quoted(nodes)} nodes (at most "
                f"80): set num_speculative_tokens to the number of nodes"
            )
        if self.num_speculative_tokens != nodes:
            raise ValueError(
                f"num_speculative_tokens ({self.num_speculative_tokens}) must be a multiple of "
                f"'width' ({self.width}), the nodes of a level"
            )
        return self

    @model_validator(mode="after")
    def _rule_fits(self):
        allowed = list(_RULES[self.shape])
        if self.verification is not None and self.verification not in allowed:
            raise ValueError(
                f"shape {self.shape!r} cannot be verified by {self.verification!r} "
                f"(allowed: {', '.join(allowed) or 'leave verification out'})"
            )
        return self

    @model_validator(mode="after")
    def _stop_fits(self):
        if self.stop.rule == "none":
            return self
        if self.shape not in _STOPPED:
            raise ValueError(
                f"'stop' ends drafts of one path, and shape {self.shape!r} has several: set "
                f"'shape' to {' or '.join(_STOPPED)}, or remove 'stop'"
            )
        if self.stop.rule not in self.stops:
            raise ValueError(
                f"'stop' by the rule {self.stop.rule!r} is not for method {self.method!r} "
                f"(allowed: {', '.join(sorted(self.stops))})"
            )
        return self

    def shape_arguments(self, depth: int) -> tuple:
        """What the shape takes for a tree of ``depth`` levels."""
        if self.shape == "rsd_c":
            return (tuple(self.branching[:depth]),)
        if self.shape == "caterpillar":
            return (depth,)
        return (1 if self.shape == "chain" else self.width, depth)

    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the largest tree."""
        if self.shape == "rsd_c":
            return tuple(math.prod(self.branching[: d + 1]) for d in range(len(self.branching)))
        if self.shape == "caterpillar":
            # The deepest there can be: how many nodes a level gets, its draft decides.
            whole, rest = divmod(self.num_speculative_tokens, CATERPILLAR_LEAST)
            return (CATERPILLAR_LEAST,) * whole + ((rest,) if rest else ())
        width, _ = self.shape_arguments(0)
        return (width,) * (self.num_speculative_tokens // width)

    @property
    def rule(self) -> str | None:
        rules = _RULES[self.shape]
        return rules[self.verification or next(iter(rules))] if rules else None

    @classmethod
    def as_source(cls, keys: dict[str, Any]) -> dict[str, Any]:
        keys = {"shape": "topk"} | keys
        if keys["shape"] in _FUSED_SHAPES:
            keys = {"verification": "recursive"} | keys
        return keys

    def check_source(self) -> None:
        # Other rules have no place for siblings that no draft distribution proposed.
        if self.rule not in (None, "without_replacement"):
            own = get_args(type(self).model_fields["shape"].annotation)
            shapes = ", ".join(shape for shape in _FUSED_SHAPES if shape in own)
            raise ValueError(
                f"'sources': {self.method!r} with shape {self.shape!r} is verified by a rule that "
                f"knows no nodes of other sources: set 'shape' to {shapes} or topk, and leave "
                f"'verification' out"
            )
