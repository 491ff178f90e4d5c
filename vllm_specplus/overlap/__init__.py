"""Drafting while the target verifies (PEARL, arXiv 2408.11850), extended to trees.

The draft runs in a process of its own, on devices of its own. While the target verifies a step's
trees, it goes on below what will most probably come of them; if that comes, the next trees are
there when the step ends.

    engine's process                                draft's process
    home.py      a Proposer: asks, waits, returns   loop.py      takes steps, answers
    pace.py      is waiting worth it, how long      rounds.py    trees below texts and outcomes
    keeper.py    starts it, anew if it is lost      outcomes.py  which outcomes are most probable
    process.py   where it runs, and how it ends

    messages.py, channel.py   what both say, and how it travels; steps.py: a step as it is told

Verification knows nothing of it. What is drafted ahead is drawn with random numbers that decide
nothing else, behind a text that is not known yet; it is used if the text became that one, and
dropped otherwise, whatever was drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_specplus.proposer import Proposer, Services


def proposer(method: type[Proposer], config: Any, services: Services) -> Proposer:
    """The proposer of an engine: of class ``method`` or, if its ``config`` asks for overlap, one
    that has it in another process."""
    if not getattr(config, "overlap", False):
        return method(config, services)
    from vllm_specplus.overlap.home import OverlappedDraft

    return OverlappedDraft(method, config, services)
