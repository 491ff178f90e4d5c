"""A forward pass in seconds: bytes, operations, short kernels, collectives, launches.

A pass is a sequence of blocks (a layer's attention, its MLP, the output layer). Each takes the
longer of loading its weights and keys and computing (the sum, on a device that does not overlap
them); short kernels and collectives come on top; and where the host launches every operation, a
pass takes no less than the launches do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vllm_specplus.planning.devices import Device
from vllm_specplus.planning.sizes import Shape
from vllm_specplus.planning.software import (
    COMPUTE_SHARE,
    LAUNCH,
    MEMORY_SHARE,
    SHORT_KERNEL,
    Software,
)

#: Bytes of an activation, a key or a value.
WIDTH = 2


@dataclass(frozen=True)
class Time:
    """Seconds by what they are spent on."""

    weights: float = 0.0
    """Loading weights, keys and values."""
    arithmetic: float = 0.0
    kernels: float = 0.0
    messages: float = 0.0
    host: float = 0.0
    """Launching and bookkeeping that the device waits for."""

    @property
    def total(self) -> float:
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        """Seconds by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: Time) -> Time:
        return Time(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> Time:
        return Time(*(factor * value for value in self.values()))

    def values(self) -> tuple[float, ...]:
        return tuple(self.terms().values())


@dataclass(frozen=True)
class Load:
    """What is asked of a model at once."""

    rows: float
    """Tokens that are computed."""
    requests: int = 1
    """Texts that they belong to."""
    context: int = 1024
    """Tokens of each text."""


@dataclass(frozen=True)
class Machine:
    """Devices of a kind, and what runs on them."""

    device: Device
    software: Software

    def block(self, size: float, operations: float, ranks: int = 1) -> Time:
        """Of ``size`` bytes and so many operations, evenly on ``ranks`` devices."""
        device = self.device
        memory = size / (device.bandwidth * MEMORY_SHARE) / ranks
        compute = operations / (device.flops * COMPUTE_SHARE) / ranks
        if not device.overlaps:
            return Time(weights=memory, arithmetic=compute)
        return Time(weights=memory) if memory >= compute else Time(arithmetic=compute)

    def collective(self, size: float, ranks: int, kind: str = "all-reduce") -> Time:
        """One collective over ``ranks`` devices; ``size`` bytes are at one device before or after.
        An all-reduce sends them twice."""
        if ranks == 1:
            return Time()
        times = 2 if kind == "all-reduce" else 1
        share = times * (ranks - 1) / ranks
        return Time(messages=self.device.latency + share * size / self.device.link)

    def launched(self, time: Time, launches: float, graph: bool) -> Time:
        """A pass of so many operations that a graph starts at once, or the host one by one."""
        if graph:
            return time + Time(kernels=launches * SHORT_KERNEL)
        waited = launches * LAUNCH - (time.total - time.messages)
        return time + Time(host=max(waited, 0.0))

    def attention(self, shape: Shape, load: Load, ranks: int = 1) -> Time:
        """One layer's projections and its attention over the texts."""
        keys = 2 * shape.kv_heads * shape.head_dim * WIDTH * load.context * load.requests
        mixed = 4 * load.rows * load.context * shape.heads * shape.head_dim
        size = shape.attention * shape.weight_bits / 8
        return self.block(size + keys, 2 * load.rows * shape.attention + mixed, ranks)

    def mlp(self, shape: Shape, load: Load, ranks: int = 1, layer: int = 0) -> Time:
        """One layer's MLP, or its experts and what every row passes beside them."""
        if not shape.experts or layer < shape.dense_layers:
            weights = computed = float(shape.mlp)
        else:
            shared = 3 * shape.hidden * shape.shared_width
            weights = shape.touched(load.rows) * shape.expert + shared
            computed = shape.chosen * shape.expert + shared
        return self.block(weights * shape.weight_bits / 8, 2 * load.rows * computed, ranks)

    def head(self, shape: Shape, load: Load, ranks: int = 1) -> Time:
        """The output layer."""
        return self.block(WIDTH * shape.embedding, 2 * load.rows * shape.embedding, ranks)

    def forward(
        self, shape: Shape, load: Load, ranks: int = 1, *, layers: float | None = None,
        draft: bool = False,
    ) -> Time:  # fmt: skip
        """One pass, tensor parallel over ``ranks`` devices, of all ``layers`` or of some; as the
        target's, or as a ``draft``'s with what chooses its tokens."""
        software, count = self.software, shape.layers if layers is None else layers
        size = load.rows * shape.hidden * WIDTH
        dense = min(shape.dense_layers, count) if shape.experts else 0
        time = (
            self.attention(shape, load, ranks) * count
            + self.mlp(shape, load, ranks) * dense
            + self.mlp(shape, load, ranks, layer=shape.layers) * (count - dense)
            + self.head(shape, load, ranks)
            + self.collective(size, ranks) * (2 * count + 1)
        )
        messages = (2 * count + 1) if ranks > 1 else 0
        kernels = (software.attention_kernels + software.mlp_kernels) * count
        kernels += software.pass_kernels + (0 if software.graphs else messages)
        return self.finished(time, kernels, draft)

    def finished(self, time: Time, kernels: float, draft: bool) -> Time:
        """A pass with its launches: a draft's has those that choose its tokens too, and its host
        runs ahead of the device."""
        software = self.software
        if not software.graphs:
            more = software.draft_launches if draft else 0
            return self.launched(time, kernels + more, graph=False)
        time = self.launched(time, kernels, graph=True)
        return self.launched(time, software.draft_launches, graph=False) if draft else time
