"""How often each source of a method is right: what its priors are set by.

    python benchmarks/source_acceptance.py --traces benchmarks/data/traces_smollm2.npz \
        --steps benchmarks/data/step_times_cpu.json --speculative-config JSON [--least 25]

Replays recorded texts one at a time (``simulator.py``), verifies up to 32 nodes in every step
and prints, for every source with ``--least`` labelled nodes, its prior and the share that was
right, given that the node's parent was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from simulator import Simulator, StepTimes, closed_loop, fixed, load_traces, vocab_size

from vllm_specplus.config import parse
from vllm_specplus.control.acceptance import AcceptanceEstimator, label_nodes


class Counting(AcceptanceEstimator):
    """Also counts every label, without decay."""

    def __init__(self, sources):
        super().__init__(sources)
        self.right = np.zeros(len(sources), int)
        self.seen = np.zeros(len(sources), int)

    def learn(
        self, tokens, parents, sources, starts, drafted_at, request_ids, rows, token_ids,
        num_tokens, cache_salts=None,
    ):  # fmt: skip
        for r in np.flatnonzero(rows >= 0):
            nodes = slice(starts[r], starts[r + 1])
            labels, _ = label_nodes(
                tokens[nodes], parents[nodes], token_ids[rows[r]], drafted_at[r],
                num_tokens[rows[r]],
            )  # fmt: skip
            known = labels >= 0
            np.add.at(self.seen, sources[nodes][known], 1)
            np.add.at(self.right, sources[nodes][known], labels[known])
        return super().learn(
            tokens, parents, sources, starts, drafted_at, request_ids, rows, token_ids, num_tokens,
            cache_salts,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--speculative-config", type=json.loads, required=True)
    parser.add_argument("--least", type=int, default=25)
    args = parser.parse_args()
    traces = load_traces(args.traces)
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    config = parse(args.speculative_config)
    simulator = Simulator(
        StepTimes.load(args.steps), fixed(32), vocab_size(traces), 1, longest + 1, config=config
    )
    simulator.controller.acceptance = counts = Counting(simulator.proposer.sources)
    closed_loop(simulator, traces, 1)
    for source, right, seen in zip(counts.sources, counts.right, counts.seen, strict=True):
        if seen >= args.least:
            print(f"{source.name:40} prior {source.prior:.2f}  right {right / seen:.2f} of {seen}")


if __name__ == "__main__":
    main()
