"""Prompts in, pictures out, by many devices: a runner (``generation.py``) on each, as Ray actors.

Data-parallel: the models are small and a batch is enough for a device. A picture is a function
of its label and seed, so when a device is lost its batch is made again elsewhere, and comes out
the same. A batch that takes every device with it, or devices that do not come back, end the work
with an error: attempts are bounded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_specplus.image.continuous.generation import PictureMaker, Recipe

#: How often a lost actor comes back, and how often a batch is tried again.
RESTARTS, RETRIES = 3, 3
#: Seconds in which an actor has to be there; a cluster that grows starts nodes meanwhile.
START_SECONDS = 600


class PicturesLost(RuntimeError):
    """Some pictures could not be made; the message says which."""


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
    PicturesLost where a batch fails again and again, or no actor can be started.
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
    # Lost actors come back, and what they had to do is done again: some times, as it may be that
    # which loses them.
    actor = ray.remote(
        num_cpus=1, num_gpus=gpus_per_worker, max_restarts=RESTARTS, max_task_retries=RETRIES
    )
    handles = [actor(Worker).remote(str(folder), recipe.model_dump()) for _ in range(workers)]
    batches = [
        (list(labels[i : i + batch]), list(seeds[i : i + batch]))
        for i in range(0, len(labels), batch)
    ]
    made: list[np.ndarray] = []
    try:
        _await_one(handles)
        for done in ActorPool(handles).map(lambda each, pair: each.make.remote(*pair), batches):
            made.append(done)
    except ray.exceptions.RayActorError as error:
        first = len(made) * batch
        raise PicturesLost(
            f"pictures {first} to {min(first + batch, len(labels)) - 1} could not be made: their "
            f"worker was lost {RETRIES + 1} times ({str(error).splitlines()[0]})"
        ) from error
    finally:
        for handle in handles:
            ray.kill(handle)
    return np.concatenate(made)


def _await_one(handles: list) -> None:
    """Wait until one of the actors is there; PicturesLost if none is in time."""
    import ray

    ready = [handle.__ray_ready__.remote() for handle in handles]
    if not ray.wait(ready, num_returns=1, timeout=START_SECONDS)[0]:
        raise PicturesLost(
            f"none of {len(handles)} workers could be started within {START_SECONDS} s: the "
            f"cluster has {ray.available_resources() or 'nothing'} left"
        )
