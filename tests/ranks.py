"""Processes with a gloo group, forked once for many calls: they have the imports.

They are children of a process that was forked before any test ran. Autograd refuses to work in a
child of one that has its threads, and torch's CUDA builds may start those without a GPU too.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Of the process: the groups of the first ranks, by how many, and a mesh of two times two.
GROUPS: dict[int, dist.ProcessGroup] = {}
MESH: list[DeviceMesh] = []
# To the process that forks them.
ORDERS: list[Connection] = []


def prepare() -> None:
    """Fork the process that forks ranks, once; it ends with this one."""
    if not ORDERS:
        here, there = Pipe()
        if not os.fork():
            here.close()
            _fork_to_order(there)
        there.close()
        ORDERS.append(here)


class Ranks:
    """``size`` processes that run functions, all the same at a time; ``close`` ends them."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/pipe") as listener:
            for rank in range(size):
                ORDERS[0].send((listener.address, rank, size, port, timeout))
                self.pipes.append(listener.accept())
        assert self("ready", ready) == list(range(size))

    def __call__(self, name: str, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returns, or the exception that it raised; None of one that died."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        found = []
        for pipe in self.pipes:
            try:
                found.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:  # noqa: PERF203
                found.append(None)
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()


def check_survivors(found: list[Any]) -> None:
    """Rank 1 died: the others ended with errors, by its name."""
    assert found[1] is None
    others = [str(answer) for rank, answer in enumerate(found) if rank != 1]
    assert all("died or did not answer" in text for text in others), others
    assert any(f"rank 1 of {len(found)}" in text for text in others), others


def ready() -> int:
    return dist.get_rank()


def _fork_to_order(orders: Connection) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    try:
        while True:
            address, *about = orders.recv()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                orders.close()
                _serve(Client(address), *about)
    finally:
        os._exit(0)


def _serve(pipe: Connection, rank: int, size: int, port: int, timeout: float) -> NoReturn:
    signal.alarm(100)  # whatever happens, it ends
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        for count in range(1, size + 1):
            group = dist.new_group(list(range(count)), timeout=timedelta(seconds=timeout))
            GROUPS[count] = group
        if size == 4:
            MESH.append(init_device_mesh("cpu", (2, 2)))
        while True:
            signal.alarm(0)
            function, args = pickle.loads(pipe.recv_bytes())
            signal.alarm(100)
            try:
                answer = function(*args)
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}")
                if os.environ.get("SHOW"):
                    traceback.print_exc()
            pipe.send_bytes(pickle.dumps(answer))
    except EOFError:
        os._exit(0)
    finally:
        os._exit(1)
