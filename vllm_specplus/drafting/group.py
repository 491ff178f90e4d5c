"""The process group in which a step's tensors travel, apart from vLLM's.

NCCL on GPUs, where messages are ordered by streams and may be recorded in CUDA graphs; gloo on
CPUs, and for what hosts tell each other. No wait polls: gloo's block in the kernel, and NCCL's are
the device's. A lost peer ends gloo's waits in an error; those of a device are ended by a watchdog.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from vllm_specplus.drafting.watchdog import Watchdog

#: A home that waits longer than this for an owner takes it for lost.
STEP_TIMEOUT = timedelta(seconds=10)
#: The same while kernels are compiled, which the first passes on a device do.
START_TIMEOUT = timedelta(seconds=60)
#: An owner waits for work as long as its connection lives; an engine may be idle for days.
IDLE_TIMEOUT = timedelta(days=365)
#: Between two looks at those who start the owners, while these load their weights.
CHECK_EVERY = timedelta(seconds=1)


def open_store(timeout: timedelta) -> dist.TCPStore:
    """Where the shards of one group meet, at a free port of this host."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)


def join_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """The store that home has opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


class Group:
    """The shards' process group. Every call is a collective or a copy, and is counted."""

    def __init__(
        self, rank: int, size: int, store: dist.Store, device: torch.device, connect: timedelta,
        host: str = "127.0.0.1", check: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """``host``: an address of this process' host that the others reach. A RuntimeError if not
        all are there after ``connect``; ``check`` is called every second of that, here and where
        they :meth:`meet`, and may raise."""
        self.rank, self.size = rank, size
        self._store = store = dist.PrefixStore("specplus", store)
        self._connect, self._check, self._meetings = connect, check, 0
        # The group itself forms in an instant, and must: its timeout is a step's.
        self.meet()
        timeout = IDLE_TIMEOUT if rank else STEP_TIMEOUT
        self._hosts = self._group = _gloo(store, rank, size, timeout, host)
        self._watchdog: Watchdog | None = None
        if device.type == "cuda":
            self._group = _nccl(dist.PrefixStore("nccl", store), rank, size)
            self._group.eager_connect_single_device(device)
            if not rank:
                self._watchdog = Watchdog(self._group.abort, START_TIMEOUT.total_seconds())
        self.counts: Counter[str] = Counter()
        """Messages by kind, as this rank has taken part in them."""
        self.sent: Counter[str] = Counter()
        """Bytes by kind, of the tensors that were handed over."""

    # -- waiting --------------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until all ranks have called this as often: none of them is held up by weights any
        more. A RuntimeError if they are not there in the time to connect."""
        self._meetings += 1
        self._store.set(f"{self._meetings} {self.rank}", "")
        keys = [f"{self._meetings} {rank}" for rank in range(self.size)]
        _wait(self._store, keys, self._connect, self._check)

    def hurry(self) -> None:
        """The first passes are over: from now on waits on a device are a step's."""
        if self._watchdog is not None:
            self._watchdog.seconds = STEP_TIMEOUT.total_seconds()

    def watch(self) -> None:
        """What has been asked of the device has to be over in time."""
        if self._watchdog is not None:
            event = torch.cuda.Event()
            event.record()
            self._watchdog.watch(event.query)

    def check(self) -> None:
        """Raise ``LostPeer`` if the wait for a peer had to be ended: results are worth nothing."""
        if self._watchdog is not None:
            self._watchdog.check()

    def close(self) -> None:
        """Let go of the peers: whoever waits for this rank gets an error."""
        if self._watchdog is not None:
            self._watchdog.close()
            with suppress(RuntimeError):  # it may have been ended already
                self._group.abort()
        self._group = self._hosts = None

    # -- messages -------------------------------------------------------------------------

    def announce(self, tensor: torch.Tensor) -> torch.Tensor:
        """From home to all, from host to host; fills ``tensor`` elsewhere."""
        return self._broadcast(self._hosts, tensor, 0)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """From ``root`` to all; fills ``tensor`` elsewhere."""
        return self._broadcast(self._group, tensor, root)

    def _broadcast(self, group: dist.ProcessGroup, tensor: torch.Tensor, root: int) -> torch.Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = root
        with self._counted("broadcast", tensor):
            group.broadcast([_bytes(tensor)], options).wait()
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Of every rank's ``tensor``, to home; [] elsewhere."""
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        outputs = [[_bytes(part) for part in parts]] if parts else []
        with self._counted("gather", tensor):
            self._group.gather(outputs, [_bytes(tensor)], options).wait()
        return parts

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[size, ...] of every rank's ``tensor`` [...], to all."""
        out = tensor.new_empty(self.size, *tensor.shape)
        with self._counted("all_gather", tensor):
            self._group._allgather_base(_bytes(out).flatten(), _bytes(tensor).flatten()).wait()
        return out

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``tensor``, in its place and in its dtype, to all."""
        with self._counted("all_reduce", tensor):
            self._group.allreduce([tensor]).wait()
        return tensor

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """To ``rank``, which receives."""
        with self._counted("copy", tensor):
            self._group.send([_bytes(tensor)], rank, 0).wait()

    def receive(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """From ``rank``, which sends; fills ``tensor``."""
        with self._counted("copy", tensor):
            self._group.recv([_bytes(tensor)], rank, 0).wait()
        return tensor

    @contextmanager
    def _counted(self, kind: str, tensor: torch.Tensor) -> Iterator[None]:
        if self._group is None:
            raise RuntimeError("the group of the draft's shards is closed")
        yield
        self.counts[kind] += 1
        self.sent[kind] += tensor.nbytes


def _wait(
    store: dist.Store, keys: list[str], longest: timedelta, check: Callable[[], None]
) -> None:
    left = longest
    while True:
        check()
        try:
            return store.wait(keys, min(CHECK_EVERY, left))
        except RuntimeError:
            left -= CHECK_EVERY
            if left <= timedelta(0):
                raise RuntimeError(f"not all shards were there in {longest}") from None


def _gloo(
    store: dist.Store, rank: int, size: int, timeout: timedelta, host: str
) -> dist.ProcessGroupGloo:
    """By the interface of ``host``, unless ``GLOO_SOCKET_IFNAME`` names another: the host's name,
    which gloo goes by, may be that of an interface that nobody else reaches."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    """A group whose lost peers are our watchdog's: torch's own ends the process. It learns that
    from the environment, which is vLLM's otherwise, when the group is made."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = IDLE_TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a type every back end carries."""
    return tensor.view(torch.uint8)
