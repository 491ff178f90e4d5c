"""Shards of a draft as threads of one process: the same messages, without its start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from vllm_specplus.drafting.graphs import Record
from vllm_specplus.drafting.group import Group
from vllm_specplus.drafting.memory import fingerprint
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.shards import Plan, Shard

CPU, CONNECT = torch.device("cpu"), timedelta(seconds=60)
SLOTS, NODES = 2000, 12


def model_of(folder: str) -> DraftModel:
    return DraftModel(folder, CPU, torch.float32)


def plan_of(folder: str, placement: str, shards: int, group_size: int = 3) -> Plan:
    return Plan(
        folder, fingerprint(folder), "float32", None, SLOTS, NODES, group_size, shards, placement
    )


@contextmanager
def in_threads(plan: Plan, record: Record | None = None) -> Iterator[tuple[Shard, Group]]:
    """Home's shard and group; the others serve it until the end."""
    models = [model_of(plan.model) for _ in range(plan.shards)]  # one by one: loading is global
    store = dist.HashStore()
    ended: list[BaseException] = []

    def serve(rank: int) -> None:
        try:
            group = Group(rank, plan.shards, store, CPU, CONNECT)
            Shard(plan, models[rank], group, record).serve()
        except BaseException as error:
            ended.append(error)

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(1, plan.shards)]
    for thread in threads:
        thread.start()
    group = Group(0, plan.shards, store, CPU, CONNECT)
    try:
        yield Shard(plan, models[0], group, record), group
        assert not ended, ended
    finally:
        group.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    # Home is gone: that is how owners end.
    assert all(isinstance(error, RuntimeError) for error in ended), ended
