"""What data sheets say of the devices that models run on.

Dense arithmetic (no sparsity) in bfloat16 with float32 sums. Bandwidths are what the sheet
promises; ``software`` knows what is reached of it. The bytes per second of a link are one
direction of one device's links to all others.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from vllm_specplus.strict import quoted

GIB = 1 << 30
#: Seconds that a collective of few bytes costs a forward pass on one node, waiting for the slowest
#: rank and all. NVLink: by plain decoding of Llama-2-7B in gpt-fast on two A100
#: (``benchmarks/data/plain_decoding.json``). Through the host's bus: an estimate.
NVLINK, PCIE = 12.5e-6, 30e-6


@dataclass(frozen=True)
class Device:
    """One device, and how it reaches others of its kind."""

    name: str
    bandwidth: float
    """Bytes per second of its memory."""
    flops: float
    """Operations per second in matrix products, bfloat16."""
    memory: int
    """Bytes."""
    link: float
    """Bytes per second to the others, one direction."""
    latency: float
    """Seconds of a collective of few bytes."""
    source: str
    overlaps: bool = True
    """Whether it computes while it loads: processors with one instruction stream do not."""

    def measured(self, bandwidth: float, flops: float) -> Device:
        """The same device with speeds that were measured."""
        return replace(self, bandwidth=bandwidth, flops=flops, source="measured")


def _gpu(
    name: str, gb_per_s: float, tflops: float, gib: int, link_gb: float, latency: float,
    source: str,
) -> Device:  # fmt: skip
    speeds = gb_per_s * 1e9, tflops * 1e12
    return Device(name, *speeds, gib * GIB, link_gb * 1e9, latency, f"NVIDIA, {source}")


#: By the name that ``--gpu`` takes.
DEVICES = {
    device.name: device
    for device in (
        _gpu("A100-40GB", 1555, 312, 40, 300, NVLINK, "A100 Tensor Core GPU data sheet (SXM4)"),
        _gpu("A100-80GB", 2039, 312, 80, 300, NVLINK, "A100 Tensor Core GPU data sheet (SXM4)"),
        _gpu("A100-PCIe", 1935, 312, 80, 32, PCIE, "A100 Tensor Core GPU data sheet (PCIe)"),
        _gpu("A10G", 600, 70, 24, 32, PCIE, "A10G data sheet"),
        _gpu("B200", 8000, 2250, 180, 900, NVLINK, "DGX B200 data sheet, per GPU"),
        _gpu("H100", 3350, 989, 80, 450, NVLINK, "H100 Tensor Core GPU data sheet (SXM5)"),
        _gpu("H100-PCIe", 2000, 756, 80, 64, PCIE, "H100 Tensor Core GPU data sheet (PCIe)"),
        _gpu("H200", 4800, 989, 141, 450, NVLINK, "H200 Tensor Core GPU data sheet (SXM)"),
        _gpu("L4", 300, 121, 24, 32, PCIE, "L4 Tensor Core GPU data sheet"),
        _gpu("L40S", 864, 362, 48, 32, PCIE, "L40S data sheet"),
        _gpu("RTX-3090", 936, 71, 24, 32, PCIE, "GA102 whitepaper"),
        _gpu("RTX-4090", 1008, 165, 24, 32, PCIE, "Ada GPU architecture whitepaper"),
        _gpu("V100", 900, 125, 32, 150, NVLINK, "V100 Tensor Core GPU data sheet (SXM2)"),
    )
}  # fmt: skip


def find(name: str) -> Device:
    """The device of that name, in any case and with or without its hyphens; ValueError, with what
    there is, if there is none."""

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text)).lower()

    wanted = plain(name)
    found = {plain(each): device for each, device in DEVICES.items()}
    if wanted in found:
        return found[wanted]
    if larger := [each for each in DEVICES if wanted and plain(each).startswith(wanted)]:
        raise ValueError(f"{quoted(name)} comes in several sizes: write {' or '.join(larger)}")
    near = difflib.get_close_matches(wanted, found, 1)
    hint = f", did you mean {found[near[0]].name}?" if near else ""
    raise ValueError(
        f"no data sheet of {quoted(name)} is known{hint} (known are {', '.join(DEVICES)})"
    )
