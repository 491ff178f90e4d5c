"""How good a retrieved token is, as sources the controller learns the acceptance of.

What speaks for a token is the length of the match that led to it (the tokens drafted since
included), the share of the matching places at which it follows, and how many places
there are: "the only one seen" is weaker than "all ten of ten".
"""

from __future__ import annotations

from numba import njit

from vllm_specplus.control.acceptance import Source

#: Classes of match lengths by their upper ends, and of frequencies by their lower ends;
#: places that agree without exception have three classes by their number.
LENGTHS = (1, 2, 3, 5, 8, 12, 20, 1 << 30)
FREQUENCIES = (0.5, 0.25, 0.1, 0.0)
UNANIMOUS = (4, 2, 1)
CLASSES = len(LENGTHS) * (len(UNANIMOUS) + len(FREQUENCIES))

# Acceptance of the continuation of a suffix match, by class of its length, as measured for
# Token Recycling's matches; and how it falls with frequency and number of places.
_BY_LENGTH = (0.17, 0.45, 0.60, 0.70, 0.80, 0.86, 0.90, 0.93)
_BY_FREQUENCY = (1.0, 0.95, 0.85, 0.7, 0.35, 0.15, 0.06)


def evidence_sources(name: str) -> tuple[Source, ...]:
    """The sources of one retriever, in the order of :func:`evidence_class`."""
    lengths = [f"up to {n}" for n in LENGTHS[:-1]] + ["longer"]
    kinds = [f"all of {n}+" for n in UNANIMOUS] + [f"{f}+" for f in FREQUENCIES]
    return tuple(
        Source(f"{name}, match {length}, {kind}", name, max(by_length * by_kind, 0.01))
        for length, by_length in zip(lengths, _BY_LENGTH, strict=True)
        for kind, by_kind in zip(kinds, _BY_FREQUENCY, strict=True)
    )


@njit(cache=True, nogil=True)
def evidence_class(length, weight, parent_weight):
    """Index of the source: a token that follows at ``weight`` of ``parent_weight`` places,
    after a match of ``length`` tokens."""
    row = 0
    while length > LENGTHS[row]:
        row += 1
    column = 0
    if weight == parent_weight:
        while weight < UNANIMOUS[column]:
            column += 1
    else:
        while weight < FREQUENCIES[column] * parent_weight:
            column += 1
        column += len(UNANIMOUS)
    return row * (len(UNANIMOUS) + len(FREQUENCIES)) + column
