"""A channel between the engine and a draft's process that never makes the engine wait by itself.

Sending and receiving are done by two threads: a process that is stopped, in the middle of a message
even, holds up these and nobody else.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vllm_specplus.overlap.messages import Message


class ChannelClosed(ConnectionError):
    """The other end is gone."""


class Channel:
    """One end of a connected stream socket, which is the channel's from then on. Messages arrive in
    order."""

    def __init__(self, stream: socket.socket):
        self._socket = stream
        self._connection = Connection(os.dup(stream.fileno()))  # frames of bytes
        self._received: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._to_send: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.closed = False
        """Is the other end gone?"""
        for loop in (self._receive, self._send):
            threading.Thread(target=loop, daemon=True, name="vllm-specplus draft").start()

    def send(self, kind: str, arrays: dict[str, np.ndarray] | None = None, **fields: Any) -> None:
        """Send a message, later; the arrays must not change any more. ChannelClosed if the other
        end is known to be gone."""
        if self.closed:
            raise ChannelClosed("the other end of the channel is gone")
        self._to_send.put(Message(kind, fields, arrays or {}))

    def receive(self, seconds: float | None) -> Message | None:
        """Return the next message, or None if none has come after ``seconds`` (None: wait for it).
        ChannelClosed once all that came before the other end went was received."""
        try:
            message = (
                self._received.get(timeout=seconds)
                if seconds != 0
                else (self._received.get_nowait())
            )
        except queue.Empty:
            return None
        if message is None:
            self._received.put(None)  # for the next caller
            raise ChannelClosed("the other end of the channel is gone")
        return message

    def close(self) -> None:
        """Let go of the connection, once what is to be sent was sent or cannot be."""
        self._to_send.put(None)

    def _receive(self) -> None:
        try:
            while True:
                self._received.put(Message.unpack(self._connection.recv_bytes()))
        except (EOFError, OSError, ValueError, TypeError):  # gone, or no message of ours
            self.closed = True
            self._received.put(None)

    def _send(self) -> None:
        try:
            while (message := self._to_send.get()) is not None:
                self._connection.send_bytes(message.pack())
        except (OSError, ValueError):
            self.closed = True
        finally:
            # Closing alone would wake neither the other thread nor the other end.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
