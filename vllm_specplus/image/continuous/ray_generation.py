"""Prompts in, pictures out, by many devices: a runner (``generation.py``) on each, as Ray actors.

Data-parallel: the models are small and a batch is enough for a device. A picture is a function
of its label and seed, so when a device is lost its batch is made again elsewhere, and comes out
the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_specplus.image.continuous.generation import PictureMaker, Recipe


class Worker:
    """The actor."""

    def __init__(self, folder: str, recipe: dict):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._maker = PictureMaker(folder, Recipe.model_validate(recipe), device)

    def make(self, labels: list[int], seeds: list[int]) -> np.ndarray:
        return self._maker(labels, seeds)


def make_pictures(
    folder: str | Path, recipe: Recipe, labels: Sequence[int], seeds: Sequence[int], *,
    workers: int, batch: int = 64, gpus_per_worker: float = 0.0, address: str | None = None,
) -> np.ndarray:  # fmt: skip
    """uint8 [N, height, width, channels], in the order of ``labels`` and ``seeds``.

    ``workers`` actors make batches of at most ``batch`` pictures, each on ``gpus_per_worker``
    of a GPU, or on a CPU if that is 0. ``folder`` is there on every node. ``address``: of the Ray
    cluster, if this process is not in one; by default RAY_ADDRESS, or a local one, which stays.
    """
    import ray
    from ray.util import ActorPool

    if len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels and {len(seeds)} seeds: one each is needed")
    if workers < 1 or batch < 1:
        raise ValueError(f"workers={workers}, batch={batch}: at least 1 of each is needed")
    PictureMaker(folder, recipe)  # mistakes are told here, not by an actor
    if not ray.is_initialized():
        # Without an address Ray would first look for a cluster that somebody else runs here.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, include_dashboard=False, log_to_driver=False)
    # Lost actors come back, and what they had to do is done again.
    actor = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=-1)
    handles = [actor(Worker).remote(str(folder), recipe.model_dump()) for _ in range(workers)]
    batches = [
        (list(labels[i : i + batch]), list(seeds[i : i + batch]))
        for i in range(0, len(labels), batch)
    ]
    try:
        made = list(ActorPool(handles).map(lambda each, pair: each.make.remote(*pair), batches))
    finally:
        for handle in handles:
            ray.kill(handle)
    return np.concatenate(made)
