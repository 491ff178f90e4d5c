"""A tensor-parallel draft, to compare a layer-parallel one with.

Heads and MLP columns of every layer are divided among the ranks, whose partial results are
summed twice per layer: what vLLM does with a draft model of ``tensor_parallel_size`` > 1.
Rank 0 is in the benchmark's process, the others run this file.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

import torch
from torch import nn

from vllm_specplus.drafting.cache import PagedCache
from vllm_specplus.drafting.easyspec import LocalAttentions
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.shards import Group, Plan, RemoteAttentions, receive_pass

CPU, CONNECT = torch.device("cpu"), timedelta(seconds=120)


def shard(model: DraftModel, rank: int, size: int) -> None:
    """Keep one rank's heads and MLP columns."""
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        by_row = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for linear in by_row:
            part = linear.weight.chunk(size, 0)[rank].clone()
            linear.weight = nn.Parameter(part, requires_grad=False)
        for linear in (attention.o_proj, mlp.down_proj):
            part = linear.weight.chunk(size, 1)[rank].clone()
            linear.weight = nn.Parameter(part, requires_grad=False)
    model.kv_heads //= size


def run_layers(
    model: DraftModel, attentions: LocalAttentions, hidden: torch.Tensor, group: Group
) -> torch.Tensor:
    """Every rank's share of a pass; the sums are collectives."""
    for layer in range(model.num_layers):
        hidden = hidden + summed(attentions.one_layer(layer, hidden), group)
        hidden = hidden + summed(model.mlp(layer, hidden), group)
    return hidden


def summed(part: torch.Tensor, group: Group) -> torch.Tensor:
    part = part.contiguous()
    group._group.allreduce([part]).wait()
    group.counts["all-reduce"] += 1
    return part


class TensorParallelExecutor(DraftExecutor):
    def __init__(self, plan: Plan, max_slots: int, max_nodes: int, port: int):
        model = DraftModel(plan.folder, CPU, torch.float32)
        shard(model, 0, plan.shards)
        super().__init__(model, max_slots, max_nodes)
        command = [sys.executable, __file__, plan.folder, str(self.cache.pages), str(plan.shards)]
        self.ranks = [
            subprocess.Popen([*command, str(rank), str(port)]) for rank in range(1, plan.shards)
        ]
        self.group = Group(0, plan.shards, "127.0.0.1", port, CPU, CONNECT)
        self._remote = RemoteAttentions(model, self.cache, plan, self.group)

    def _forward(self, tokens, rows, exact):
        self._remote.begin(rows, exact)
        hidden = self.group.broadcast(self.model.embed(tokens).contiguous())
        here = LocalAttentions(self.model, self.cache)
        here.begin(rows, exact)
        return run_layers(self.model, here, hidden, self.group)

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@torch.inference_mode()
def serve(folder: str, pages: int, size: int, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    model = DraftModel(folder, CPU, torch.float32)
    shard(model, rank, size)
    layers = range(model.num_layers)
    cache = PagedCache(layers, model.kv_heads, model.head_dim, pages, model.dtype, CPU)
    local = LocalAttentions(model, cache)
    group = Group(rank, size, "127.0.0.1", port, CPU, CONNECT)
    while True:
        rows, exact = receive_pass(group, CPU)
        local.begin(rows, exact)
        hidden = torch.empty(len(rows.positions), model.config.hidden_size)
        run_layers(model, local, group.broadcast(hidden), group)


if __name__ == "__main__":
    with suppress(RuntimeError):  # of a benchmark that has ended
        serve(sys.argv[1], *map(int, sys.argv[2:]))
