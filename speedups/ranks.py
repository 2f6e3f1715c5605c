"""Processes that step together: one message a step, and no process outlives another.

Several processes ("ranks", 0 to size - 1) run one model, each a part of it. The numbers that they
add up travel through `torch.distributed`. Two things do not fit there, and this file has them:

    rank 0 ──── a message before each step ────> rank 1      an idle rank waits for hours
       └──────── (a TCP connection each) ──────> rank 2      a dead one ends all within a second

A collective has a time limit, after which it fails. But a server without requests may be idle all
night, so the message that begins a step has no limit. And a rank whose partner is dead must not
wait for the limit: NCCL's is ten minutes. The operating system closes the connections of a process
that dies, whatever it died of. So a thread in each rank looks at its connections five times a
second. If one is closed, the rank prints a sentence and ends at once with exit code 1. The engine's
thread cannot do it: it may be inside of a collective that never returns.

How it is checked: tests/speedups/test_tensor_parallel.py kills a rank in the middle of a step.
vLLM starts and watches its workers with its own executor; `torchrun` ends all ranks too, but within
its own polling, and only those that it has started.
"""

import atexit
import hmac
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# For a collective, and for the connections at the start. A rank may wait for another one that
# compiles its kernels. (A dead rank is noticed by its closed connection, not by this limit.)
LIMIT = timedelta(minutes=5)
LOOK_S = 0.2  # seconds between two looks at the connections
LENGTH = struct.Struct("!Q")  # before each message: its length in bytes; 0 is the end


def join(device_type: str) -> "Ranks":
    """This process's place among the ranks; all of them must call it.

    It uses the group that `torch.distributed` has. Without one it makes a group, as `torchrun` has
    described it in the environment: NCCL for GPUs, one GPU a rank, and gloo for CPUs. Raises
    ValueError if there is neither.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                "tensor_parallel needs several processes: start them with torchrun "
                "--nproc-per-node 2, or call torch.distributed.init_process_group before"
            )
        if device_type == "cuda":
            local, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= num_gpus:
                raise ValueError(f"rank {local} of this machine has no GPU, there are {num_gpus}")
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=LIMIT)
        # Its threads must end before the process does, or the C++ library may abort it.
        atexit.register(dist.destroy_process_group)
    return Ranks()


class Ranks:
    """The ranks as one of them sees them: `rank` is its own number, `size` how many there are."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.bytes_summed = self.bytes_gathered = 0  # so far, by this rank's collectives
        self._is_closed = False
        self._reading = threading.Lock()  # held while a message is read, and while `_watch` looks
        self._ending = threading.Lock()  # taken once, by the thread that ends the process
        self._links = self._connect()  # rank -> connection; a follower has one, to rank 0
        if self._links:
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    # ---- numbers: collectives ----
    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place: an all-reduce."""
        if self.size > 1:
            self.bytes_summed += x.nbytes
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x (M, n), one after the other along the columns: (M, size * n)."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size, *x.shape)
        self.bytes_gathered += parts.nbytes
        dist.all_gather(list(parts), x.contiguous())
        return parts.transpose(0, 1).flatten(1)

    def collect(self, value: Any) -> list:
        """The values of all ranks, in the order of the ranks. Called at the start, not in steps."""
        values = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            self.fail(error)
        return values

    # ---- messages: from rank 0 to the others ----
    def send(self, message: bytes) -> None:
        """Send a message, not empty, to all other ranks."""
        for link in self._links.values():
            try:
                link.sendall(LENGTH.pack(len(message)) + message)
            except OSError as error:
                self.fail(error)

    def receive(self) -> bytes | None:
        """The next message of rank 0, however long it takes; None at the end."""
        with self._reading:
            length = LENGTH.unpack(self._read(LENGTH.size))[0]
            if length == 0:
                self._is_closed = True
                return None
            return self._read(length)

    def _read(self, num_bytes: int) -> bytes:
        with suppress(OSError):
            data = b""
            while len(data) < num_bytes:
                part = self._links[0].recv(num_bytes - len(data))
                if not part:
                    break
                data += part
            else:
                return data
        self.end(f"rank 0 has ended, so rank {self.rank} ends too")

    # ---- the end ----
    def close(self) -> None:
        """On rank 0, in order: the other ranks end without an error. Twice is harmless."""
        if not self._is_closed:
            self._is_closed = True
            for link in self._links.values():
                with suppress(OSError):
                    link.sendall(LENGTH.pack(0))
                link.close()

    def abandon(self) -> None:
        """The other ranks end with an error, and this process goes on without them."""
        self._is_closed = True
        for link in self._links.values():
            link.close()

    @property
    def is_closed(self) -> bool:
        """Whether there are no other ranks any more."""
        return self._is_closed

    def fail(self, error: BaseException) -> None:
        """End this process after an error in a step: the ranks can never agree again."""
        # If the error is that another rank is gone, then `_watch` knows which one, and is first.
        time.sleep(5 * LOOK_S)
        words = " ".join(str(error).split())[:300]
        self.end(f"rank {self.rank} failed: {type(error).__name__}: {words}")

    def end(self, sentence: str) -> None:
        """Print why, and end this process with exit code 1, whatever its other threads do."""
        self._ending.acquire()  # never released: a second thread that comes here waits for the end
        with suppress(Exception):
            sys.stdout.flush()
            print(f"tensor parallel: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    def _watch(self) -> None:
        """Look at the connections until one is closed from the other side."""
        while True:
            for rank, link in self._links.items():
                with self._reading:
                    is_gone = not self._is_closed and is_closed(link)
                if is_gone and not self._is_closed:
                    self.end(f"rank {rank} has ended, so rank {self.rank} ends too")
            if self._is_closed:
                return
            time.sleep(LOOK_S)

    # ---- the start ----
    def _connect(self) -> dict[int, socket.socket]:
        """Connect each rank with rank 0. Collectives tell them its address and a secret."""
        if self.size == 1:
            return {}
        # torchrun sets the variable to the address of rank 0's machine.
        listener, offer = None, None
        if self.rank == 0:
            listener = socket.create_server((os.environ.get("MASTER_ADDR", "127.0.0.1"), 0))
            listener.settimeout(LIMIT.total_seconds())
            offer = listener.getsockname()[:2], secrets.token_bytes(16)
        address, secret = self.collect(offer)[0]
        if listener is None:
            link = socket.create_connection(address, LIMIT.total_seconds())
            link.sendall(secret + LENGTH.pack(self.rank))
            return {0: prepared(link)}
        links: dict[int, socket.socket] = {}
        with listener:
            while len(links) < self.size - 1:
                link, _ = listener.accept()
                hello = link.recv(len(secret) + LENGTH.size, socket.MSG_WAITALL)
                if hmac.compare_digest(hello[: len(secret)], secret):  # else it is a stranger
                    links[LENGTH.unpack(hello[len(secret) :])[0]] = prepared(link)
        return links


def prepared(link: socket.socket) -> socket.socket:
    """A connection without delay or time limit, which notices a machine that is switched off."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # An empty packet after 3 idle seconds, then each second; 4 without an answer close it.
    for name, value in {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def is_closed(link: socket.socket) -> bool:
    """Whether the other side of a connection is gone. It reads nothing, and does not wait."""
    try:
        readable, _, _ = select.select([link], [], [], 0)
        return bool(readable) and not link.recv(1, socket.MSG_PEEK)  # b"": the end of the stream
    except (OSError, ValueError):
        return True
