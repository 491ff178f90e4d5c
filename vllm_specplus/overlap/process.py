"""Where a draft runs while the target verifies: a process of its own, and its end.

On a CPU a child of the engine's process, bound to cores of its own; on GPUs an actor that Ray finds
a device for. Both are reached through one :class:`~vllm_specplus.overlap.channel.Channel` and end
when it does.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from typing import Protocol

from vllm_specplus.drafting.overlap_config import cores_of
from vllm_specplus.drafting.placement import apart_from, own_cluster
from vllm_specplus.drafting.ray_owners import CONNECT_SECONDS, PlacementError
from vllm_specplus.overlap.channel import Channel
from vllm_specplus.overlap.ray_process import Order
from vllm_specplus.target import TargetDevice

#: For a process to end by itself, once the channel is closed; for a cluster to find a device.
END_SECONDS, RESERVE_SECONDS = 5, 30
#: Variables by which vLLM binds the threads of its own workers.
_BINDINGS = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


class DraftProcess(Protocol):
    """A process that serves ``loop.serve``."""

    channel: Channel

    def pids(self) -> list[int]:
        """Those of its processes that are children of this one."""

    def ended(self) -> str | None:
        """How it ended, None: it has not, as far as is known."""

    def close(self) -> None:
        """End it, in bounded time."""


class _Child:
    """A child process, ended by its channel."""

    channel: Channel
    _process: subprocess.Popen

    def pids(self) -> list[int]:
        return [self._process.pid]

    def ended(self) -> str | None:
        status = self._process.poll()
        return None if status is None else f"the draft's process ended ({status})"

    def close(self) -> None:
        if hasattr(self, "channel"):
            self.channel.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # also if it is stopped
            self._process.wait()


class LocalProcess(_Child):
    """On cores of this machine."""

    def __init__(self, cores: str):
        """``cores`` as ``draft_cores``."""
        named = sorted(cores_of(cores))
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k not in _BINDINGS}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_specplus.overlap", str(theirs.fileno()),
                 ",".join(map(str, named))],
                env=environment | {"OMP_NUM_THREADS": str(len(named))}, stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the engine, which then closes.
                start_new_session=True,
            )  # fmt: skip
        self.channel = Channel(ours)


class RayProcess(_Child):
    """On a device that Ray finds; the child talks to Ray."""

    def __init__(self, resource: str, address: str | None, targets: list[TargetDevice]):
        """``resource``: "GPU", or in tests "CPU"; ``address`` and ``targets`` as of
        ``placement.Placement``. PlacementError in bounded time if nothing connects."""
        order = Order(resource, address or own_cluster(), RESERVE_SECONDS)
        # A cluster of its own must not give away the target's GPUs, of which Ray knows nothing.
        own = resource == "GPU" and order.address is None
        environment = apart_from(targets) if own else dict(os.environ)
        token = secrets.token_hex(16)
        with socket.create_server(("", 0)) as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_specplus.overlap.ray_process", order.dump()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                start_new_session=True, env=environment,
            )  # fmt: skip
            where = {"host": _host(), "port": listener.getsockname()[1], "token": token}
            try:
                with contextlib.suppress(BrokenPipeError):  # it has failed, and says why
                    self._process.stdin.write(json.dumps(where) + "\n")
                self.channel = Channel(self._accept(listener, token.encode()))
            except BaseException:
                self.close()
                raise

    def _accept(self, listener: socket.socket, token: bytes) -> socket.socket:
        """The actor's connection. Others, which do not know the token, are turned away."""
        end = time.monotonic() + RESERVE_SECONDS + CONNECT_SECONDS
        listener.settimeout(0.2)
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise PlacementError(self._failure())
            try:
                stream, _ = listener.accept()
            except TimeoutError:
                continue
            stream.settimeout(5)
            try:
                shown = stream.recv(len(token), socket.MSG_WAITALL)
            except TimeoutError:
                shown = b""
            if hmac.compare_digest(shown, token):
                stream.settimeout(None)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return stream
            stream.close()
        raise PlacementError("no process for the draft connected in time")

    def _failure(self) -> str:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)["failed"]
        return f"the process that talks to Ray ended ({self._process.wait()})"

    def ended(self) -> str | None:
        return None if self._process.poll() is None else self._failure()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        super().close()
        self._process.stdout.close()


def _host() -> str:
    """This machine's address, as those see it that Ray may put the draft on."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def check_apart(gpu: str, targets: list[TargetDevice]) -> None:
    """Raise PlacementError if the ``gpu`` of a draft, by its id, is one that the target is on."""
    if gpu in {each.uuid for each in targets}:
        raise PlacementError(
            f"Ray has put the draft on a GPU of the target ({gpu}), where drafting and verifying "
            "would take turns: start that cluster with CUDA_VISIBLE_DEVICES set to the other GPUs, "
            "or remove 'overlap'"
        )
