"""How good a retrieved token is, as sources the controller learns the acceptance of.

What speaks for a token is the length of the match that led to it (the tokens drafted since
included), the share of the matching places at which it follows, and how many places
there are: "the only one seen" is weaker than "all ten of ten".
"""

from __future__ import annotations

from numba import njit

from vllm_specplus.step import Source

#: Classes of match lengths by their upper ends, and of frequencies by their lower ends;
#: places that agree without exception have three classes by their number.
LENGTHS = (1, 2, 3, 5, 8, 12, 20, 1 << 30)
FREQUENCIES = (0.5, 0.25, 0.1, 0.0)
UNANIMOUS = (4, 2, 1)
CLASSES = len(LENGTHS) * (len(UNANIMOUS) + len(FREQUENCIES))

# Acceptance by class of length, where all places agree, and how it falls with frequency and
# number of places: Spec-Bench answers of SmolLM2, by benchmarks/source_acceptance.py.
_BY_LENGTH = (0.40, 0.55, 0.62, 0.72, 0.80, 0.86, 0.90, 0.93)
_BY_FREQUENCY = (1.0, 0.73, 0.64, 0.55, 0.22, 0.09, 0.02)


def evidence_sources(name: str, trust: float) -> tuple[Source, ...]:
    """The sources of one retriever, in the order of :func:`evidence_class`.

    ``trust``: how much less than a request's own text its texts tell, before anything is
    learnt, in (0, 1].
    """
    lengths = [f"up to {n}" for n in LENGTHS[:-1]] + ["longer"]
    kinds = [f"all of {n}+" for n in UNANIMOUS] + [f"{f}+" for f in FREQUENCIES]
    return tuple(
        Source(f"{name}, match {length}, {kind}", name, trust * by_length * by_kind)
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
