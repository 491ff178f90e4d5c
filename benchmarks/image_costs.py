"""What image models cost beside the model: neighbours, groups, and decoding.

    python benchmarks/image_costs.py [--json OUT] [--repeats 3] [--pixels 256,512,768]

* ``neighbours``: the start of ``lantern``, seconds for the 1,000 nearest of LlamaGen's 16,384 codes
  (the reference sorts all).
* ``gsd``: one rejected row at Chameleon's size (65,536 tokens, 8,192 codes, embeddings of 4,096),
  with the distance filter; its table's seconds and bytes, and the row's milliseconds where all
  codes are possible and where the 2,000 most probable are.
* ``decoding``: seconds and peak memory of one picture by Chameleon's decoder (its sizes, random
  weights), and of several at once, by threads of each.

Medians; on a CPU, whose kernel counts the memory. Nothing else should run beside it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from one_engine import save

from vllm_specplus.image.vq import Decoder, VQConfig
from vllm_specplus.samplers.registry import make_rule
from vllm_specplus.samplers.relaxed_sampling import Closeness, neighbours

CODES, TOKENS, HIDDEN = 8192, 65536, 4096
DECODER = VQConfig(codebook_size=CODES, codebook_dim=256)


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def seconds(repeats: int, call: Callable[..., object], *arguments: object) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
    return median(times)


def of_neighbours(repeats: int) -> dict[str, float]:
    codebook = torch.randn(16384, 8)
    return {"seconds": seconds(repeats, neighbours, codebook, 1000)}


def of_gsd(repeats: int) -> dict[str, float]:
    embeddings = torch.randn(CODES + 4, HIDDEN) / HIDDEN**0.5
    most = float((embeddings[0] - embeddings[1]).square().sum())  # half of all pairs are closer
    keys = {"group": 14, "max_gap": 0.15, "max_distance": most, "vectors": "embeddings"}
    given = {"codebook": embeddings[:, :256], "embeddings": lambda: embeddings}
    start = time.perf_counter()
    rule = make_rule("gsd", keys, **given)
    out = {"table_seconds": time.perf_counter() - start}
    out["table_bytes"] = sum(
        each.nbytes for each in vars(Closeness(embeddings[:, :8], 1.0)).values()
    )
    logits = torch.full((1, TOKENS), -torch.inf)
    logits[0, 4 : CODES + 4] = torch.randn(CODES)
    every = logits.softmax(-1)
    top = torch.zeros_like(every).scatter_(1, *every.topk(2000)[::-1])
    for name, p in (("all", every), ("top_2000", top / top.sum())):
        q = p.roll(1, -1)
        took = seconds(repeats, rule.residual, p, q, torch.tensor([True]), p.argmax(-1))
        out[f"row_ms_{name}"] = 1000 * took
    return out


def of_decoding(repeats: int, pixels: list[int]) -> list[dict[str, float]]:
    decoder = Decoder(DECODER, attention=False).eval()
    cores, runs = torch.get_num_threads(), []

    @torch.inference_mode()
    def decode(side: int) -> None:
        decoder(torch.randn(1, DECODER.latent_channels, side // 16, side // 16))

    def decode_all(pool: ThreadPoolExecutor, sides: list[int]) -> None:
        list(pool.map(decode, sides))

    for side in pixels:
        for at_once, threads in ((1, cores), (1, 1), (min(cores, 4), 1)):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads,
                                    initargs=(threads,)) as pool:  # fmt: skip
                decode_all(pool, [side] * at_once)
                idle = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                took = seconds(repeats, decode_all, pool, [side] * at_once)
            runs.append({
                "pixels": side, "at_once": at_once, "threads_each": threads,
                "seconds_per_picture": took / at_once, "peak_bytes": resident("VmHWM") - idle,
            })  # fmt: skip
    torch.set_num_threads(cores)
    return runs


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    repeats: Annotated[int, typer.Option()] = 3,
    pixels: Annotated[str, typer.Option(help="Sides, separated by commas.")] = "256,512,768",
) -> None:
    torch.manual_seed(0)
    report = {
        "command": " ".join(sys.argv), "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "repeats": repeats,
        "neighbours": of_neighbours(repeats), "gsd": of_gsd(repeats),
        "decoding": of_decoding(repeats, [int(each) for each in pixels.split(",")]),
    }  # fmt: skip
    print(report)
    if json_path:
        save(json_path, report)


if __name__ == "__main__":
    typer.run(main)
