"""Two processes of a test."""

import socket

import torch.multiprocessing as mp


def run_two(work, folder):
    """``work(rank, port, folder)`` in both, which may meet at that port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=2)
