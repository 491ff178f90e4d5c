"""Which method and which placement pay, for a model on hardware that need not be here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vllm_specplus.control import memory
from vllm_specplus.planning import rounds
from vllm_specplus.planning.acceptance import KNOWN, expected, expected_overlapped
from vllm_specplus.planning.devices import Device
from vllm_specplus.planning.passes import Load, Machine, Time
from vllm_specplus.planning.rounds import PLACEMENTS, Round
from vllm_specplus.planning.sizes import Shape
from vllm_specplus.planning.software import VLLM

#: Medians of |predicted / measured - 1|: here on CPUs, and of published tables. A test compares
#: them with ``benchmarks/results/plan/check.json``.
ERROR_HERE, ERROR_PUBLISHED = 0.067, 0.156
MOST_LEVELS = 12
#: vLLM's ``gpu_memory_utilization``.
MEMORY_SHARE = 0.92
#: Of the target's layers that draft: ``layer_skip`` with ``skip_share`` 0.2, and half of them.
SKIPPING, EXITING = 0.8, 0.5
#: Nodes per level of a looked-up tree: about what ``token_recycling`` drafts for one request.
LOOKED_UP = 3

#: Where a draft goes on while the target verifies: on a device that the target does not use.
OVERLAPPED = "its own device, overlapped"


@dataclass(frozen=True)
class Wanted:
    """What is asked: a model, its draft and the hardware."""

    target: Shape
    draft: Shape | None
    device: Device
    ranks: int
    requests: int = 1
    context: int = 1024
    acceptance: float | None = None
    """None: what is known of each method."""

    @property
    def machine(self) -> Machine:
        return Machine(self.device, VLLM)

    @property
    def load(self) -> Load:
        return Load(self.requests, self.requests, self.context)

    def rate(self, method: str) -> float:
        return KNOWN[method].rate if self.acceptance is None else self.acceptance


@dataclass(frozen=True)
class Row:
    """One method at one place, with as many levels as are best."""

    method: str
    placement: str
    levels: int
    acceptance: float
    tokens: float
    """Of a round."""
    draft: Time
    verify: Time
    ratio: float
    """Times the speed of plain decoding."""
    pays_from: float | None
    """The lowest acceptance at which it is no slower than plain decoding; None: at none."""
    decided: str
    """What weighs most."""

    def report(self) -> dict[str, Any]:
        """For programs; milliseconds by what they are spent on."""
        shown = {key: value for key, value in asdict(self).items() if not isinstance(value, dict)}
        for name in ("draft", "verify"):
            terms = getattr(self, name).terms()
            shown[f"{name}_ms"] = {key: 1e3 * value for key, value in terms.items()}
        return shown


# -- rows ---------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A method at a place."""

    method: str
    placement: str
    drafting: Callable[[int], Time]
    """By levels."""
    width: int = 1
    """Nodes of a level."""
    overlaps: bool = False
    """Whether the target verifies meanwhile."""

    def tokens(self, rate: float, levels: int) -> float:
        """Of a round."""
        return (expected_overlapped if self.overlaps else expected)(rate, levels)

    def round(self, wanted: Wanted, levels: int) -> Round:
        """With so many levels."""
        nodes = levels - 1 if self.overlaps else levels * self.width
        verify = rounds.verified(wanted.machine, wanted.target, wanted.load, nodes, wanted.ranks)
        draft = self.drafting(levels)
        if self.overlaps:  # what is not hidden
            draft = draft * max(1 - verify.total / draft.total, 0.0)
        return Round(draft, verify)


def candidates(wanted: Wanted) -> Iterator[Candidate]:
    """All there is."""
    machine, load, target, ranks = wanted.machine, wanted.load, wanted.target, wanted.ranks
    if (draft := wanted.draft) is not None:
        for name, place in PLACEMENTS.items():
            apart = name.startswith("EasySpec")
            if name == "one device" or (ranks > 1 and not (apart and draft.layers < 3)):
                method = "easyspec" if apart else "draft_tree"
                yield Candidate(method, name, partial(place, machine, draft, load, ranks))
        alone = partial(rounds.one_device, machine, draft, load, 1)
        yield Candidate("draft_tree", OVERLAPPED, alone, overlaps=True)
    one = "one device"
    yield Candidate("eagle_tree", one, partial(rounds.head_drafts, machine, target, load))
    yield Candidate("block_tree", one, partial(rounds.medusa_drafts, machine, target, load))
    yield Candidate("token_recycling", "host", lambda levels: rounds.look_up(load), LOOKED_UP)
    for method, share in (("layer_skip", SKIPPING), ("early_exit", EXITING)):
        drafting = partial(rounds.own_layers, machine, target, load, ranks, share)
        yield Candidate(method, "all ranks", drafting)


def rows(wanted: Wanted) -> list[Row]:
    """All methods and placements, the fastest first."""
    plain = rounds.step(wanted.machine, wanted.target, wanted.load, wanted.ranks)
    found = [_row(wanted, candidate, plain) for candidate in candidates(wanted)]
    return sorted(found, key=lambda row: -row.ratio)


def _row(wanted: Wanted, candidate: Candidate, plain: Time) -> Row:
    tried = {levels: candidate.round(wanted, levels) for levels in range(1, MOST_LEVELS + 1)}

    def speed(rate: float, levels: int) -> float:
        return candidate.tokens(rate, levels) * plain.total / tried[levels].seconds

    rate = wanted.rate(candidate.method)
    levels = max(tried, key=lambda each: speed(rate, each))
    lowest = next(
        (at / 100 for at in range(101) if any(speed(at / 100, each) >= 1 for each in tried)), None
    )
    best = tried[levels]
    return Row(
        candidate.method, candidate.placement, levels, rate, candidate.tokens(rate, levels),
        best.draft, best.verify, speed(rate, levels), lowest, _heaviest(best, plain),
    )  # fmt: skip


def _heaviest(one: Round, plain: Time) -> str:
    """What a round spends most on beyond a plain step."""
    more = {f"drafting: {name}": value for name, value in one.draft.terms().items()}
    for name, value in (one.verify + plain * -1).terms().items():
        more[f"verifying: {name}"] = value
    name = max(more, key=lambda each: more[each])
    return f"{name} ({1e3 * more[name]:.2f} of {1e3 * one.seconds:.2f} ms)"


# -- the question of placement ------------------------------------------------


def answer(found: list[Row]) -> list[str]:
    """Sentences: what pays, and for each way to draft in parallel against one device, why."""
    best = found[0]
    where = f"{best.method} on {best.placement}" if best.placement != "host" else best.method
    lines = [
        f"Best: {where}, {best.levels} levels, {best.ratio:.2f} times plain decoding."
        if best.ratio > 1
        else "Nothing here is faster than plain decoding."
    ]
    drafts = [row for row in found if row.method in ("draft_tree", "easyspec")]
    single = next((row for row in drafts if row.placement == "one device"), None)
    if single is not None:
        lines += [_against(row, single) for row in drafts if row is not single]
    return lines


def _against(row: Row, single: Row) -> str:
    """One placement against the draft on one device."""
    gain = row.ratio / single.ratio
    if row.placement == OVERLAPPED:
        hidden = 1e3 * (single.draft.total / single.levels - row.draft.total / row.levels)
        return (
            f"{row.placement}: {gain:.2f} times the draft on one device; decided by what verifying "
            f"hides of a level, {hidden:.2f} ms."
        )
    per_level = row.draft * (1 / row.levels) + single.draft * (-1 / single.levels)
    terms = {name: 1e3 * value for name, value in per_level.terms().items()}
    decided = sorted(terms, key=lambda name: -abs(terms[name]))[:2]
    why = ", ".join(f"{name} {terms[name]:+.2f} ms" for name in decided if abs(terms[name]) > 5e-3)
    verdict = f"{row.placement}: {gain:.2f} times the draft on one device"
    if row.method == "easyspec":
        verdict += (
            f", so it pays while it keeps {100 / gain:.0f} % of the tokens of a round"
            if gain > 1
            else ", so it does not pay"
        )
    return f"{verdict}; decided by, per level: {why or 'nothing'}."


# -- memory -------------------------------------------------------------------


def room(wanted: Wanted, config: dict[str, Any]) -> memory.Plan:
    """What fits beside the weights on the fullest device, by the model of ``doctor --budget``;
    ValueError, in one sentence, if the weights do not."""
    dims = memory.ModelDimensions.from_config(config, wanted.ranks)
    given = int(wanted.device.memory * MEMORY_SHARE)
    weights = wanted.target.weight_bytes // wanted.ranks
    if wanted.draft is not None:
        weights += wanted.draft.weight_bytes + _draft_keys(wanted)
    if weights >= given:
        raise ValueError(
            f"the weights take {memory.human(weights)} of each device, and "
            f"{wanted.device.name} gives {memory.human(given)}: raise --tp, or name another --gpu"
        )
    return memory.plan(dims, given - weights, wanted.context, wanted.requests)


def _draft_keys(wanted: Wanted) -> int:
    """Keys and values of a draft that is whole on one device."""
    draft = wanted.draft
    assert draft is not None
    token = 4 * draft.layers * draft.kv_heads * draft.head_dim
    return token * wanted.context * wanted.requests
