"""``python -m vllm_specplus.overlap FD CORES``: a draft's process on a CPU.

``FD`` is a connected socket that it inherits; ``CORES``, as ``2,3``, those that it runs on.
"""

from __future__ import annotations

import os
import socket
import sys


def main() -> None:
    cores = [int(core) for core in sys.argv[2].split(",")]
    os.sched_setaffinity(0, cores)  # before any library counts them
    import torch

    from vllm_specplus.overlap.channel import Channel
    from vllm_specplus.overlap.loop import serve

    torch.set_num_threads(len(cores))
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))), torch.device("cpu"), gpu="")


if __name__ == "__main__":
    main()
