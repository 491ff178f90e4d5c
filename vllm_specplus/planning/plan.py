"""Which method and which placement pay, for a model on hardware that need not be here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vllm_specplus.control import memory
from vllm_specplus.planning import rounds
from vllm_specplus.planning.acceptance import KNOWN, expected
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
#: Nodes of a tree that is looked up, by its levels: as many as ``token_recycling`` drafts alone.
LOOKED_UP = 3

Draft = Callable[[int], Time]


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


def candidates(wanted: Wanted) -> Iterator[tuple[str, str, Draft, int]]:
    """(method, placement, seconds of drafting by levels, nodes per level) of all there is."""
    machine, load, target, ranks = wanted.machine, wanted.load, wanted.target, wanted.ranks
    if wanted.draft is not None:
        for name, place in PLACEMENTS.items():
            if ranks == 1 and name != "one device":
                continue
            if name.startswith("EasySpec") and wanted.draft.layers < 3:
                continue
            method = "easyspec" if name.startswith("EasySpec") else "draft_tree"
            drafting = partial(_placed, place, machine, wanted.draft, load, ranks)
            yield method, name, drafting, 1
    one = "one device"
    yield "eagle_tree", one, partial(rounds.head_drafts, machine, target, load), 1
    yield "block_tree", one, partial(rounds.medusa_drafts, machine, target, load), 1
    yield "token_recycling", "host", lambda levels: rounds.look_up(load), LOOKED_UP
    for method, share in (("layer_skip", SKIPPING), ("early_exit", EXITING)):
        drafting = partial(_own_layers, machine, target, load, ranks, share)
        yield method, "all ranks", drafting, 1


def _placed(
    place: rounds.Placement, machine: Machine, draft: Shape, load: Load, ranks: int, levels: int
) -> Time:
    return place(machine, draft, load, levels, ranks)


def _own_layers(
    machine: Machine, target: Shape, load: Load, ranks: int, share: float, levels: int
) -> Time:
    return rounds.own_layers(machine, target, load, levels, ranks, share)


def rows(wanted: Wanted) -> list[Row]:
    """All methods and placements, the fastest first."""
    plain = rounds.step(wanted.machine, wanted.target, wanted.load, wanted.ranks)
    found = []
    for method, placement, drafting, width in candidates(wanted):
        tried = [
            (
                levels,
                Round(
                    drafting(levels),
                    rounds.verified(
                        wanted.machine, wanted.target, wanted.load, levels * width, wanted.ranks
                    ),
                ),
            )
            for levels in range(1, MOST_LEVELS + 1)
        ]
        found.append(_row(method, placement, wanted.rate(method), plain, tried))
    return sorted(found, key=lambda row: -row.ratio)


def _row(
    method: str, placement: str, rate: float, plain: Time, tried: list[tuple[int, Round]]
) -> Row:
    def speed(rate: float, levels: int, one: Round) -> float:
        return expected(rate, levels) * plain.total / one.seconds

    levels, best = max(tried, key=lambda each: speed(rate, *each))
    lowest = next(
        (at / 100 for at in range(101) if any(speed(at / 100, *each) >= 1 for each in tried)), None
    )
    return Row(
        method, placement, levels, rate, expected(rate, levels), best.draft, best.verify,
        speed(rate, levels, best), lowest, _heaviest(best, plain),
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
    single = next((row for row in found if row.placement == "one device"
                   and row.method == "draft_tree"), None)  # fmt: skip
    others = [row for row in found if row.placement in PLACEMENTS and row is not single]
    for row in others if single else ():
        if row.method in ("draft_tree", "easyspec"):
            lines.append(_against(row, single))
    return lines


def _against(row: Row, single: Row) -> str:
    """One placement against the draft on one device."""
    gain = row.ratio / single.ratio
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
