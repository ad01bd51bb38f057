"""Training in several processes, as ``torchrun`` starts them: who they are, and what they have to agree on."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from atst_fast.train.config import UserError
from atst_fast.train.device import pick_device

# the older name warns where there is the newer one
_NEWER, _OLDER = "forward_sync_buffers", "broadcast_buffers"
_SYNC_BUFFERS = _NEWER if _NEWER in inspect.signature(DistributedDataParallel).parameters else _OLDER
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class World:
    """The processes of a run; this one is number ``rank`` of ``size`` and computes on ``device``. torchrun has started
    them anew ``restarts`` times.

    Every process calls the same methods in the same order. With one process they do nothing.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, restarts: int = 0):
        self.device, self.rank, self.size, self.restarts = device, rank, size, restarts
        # of its own, on the CPU: its operations never mix with those of the gradients, nor wait for a GPU
        self._hosts = dist.new_group(backend="gloo") if size > 1 else None
        self._vote: tuple[Tensor, dist.Work] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once: logs, weights."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed of this process's own; the first one keeps ``seed``."""
        return (seed + 1_000_003 * self.rank) % 2**63

    def replicate(self, model: Any, *, find_unused: bool = False) -> Any:
        """``model`` as it computes here, with gradients that are the mean of all processes', and statistics of the
        heads that are over the rows of all; ``find_unused``: there are parameters that no loss depends on.

        Nothing is broadcast but the parameters, now: the running statistics stay equal by themselves.
        """
        if self.size == 1:
            return model
        options: dict[str, Any] = {_SYNC_BUFFERS: False, "find_unused_parameters": find_unused}
        replica = DistributedDataParallel(model, **options)
        # After it has been wrapped: DistributedDataParallel refuses SyncBatchNorm on a CPU, where torch's own cannot
        # run. Here ops.batch_norm_relu does. The parameters stay the same objects.
        nn.SyncBatchNorm.convert_sync_batchnorm(replica.module)
        return replica

    def share(self, number: int) -> range:
        """Which of ``number`` things are this process's: as many as every other has, or one more or less."""
        return range(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def gather(self, items: list[Any]) -> list[Any]:
        """What all processes give, in the order of the processes, in the first one; nothing in the others."""
        if self._hosts is None:
            return items
        parts: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(items, parts, dst=0, group=self._hosts)
        return [item for part in parts or () for item in part]

    def tell(self, item: Any) -> Any:
        """What the first process gives, in all of them."""
        if self._hosts is None:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self._hosts)
        return items[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self._hosts is not None:
            dist.barrier(self._hosts)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of all processes' ``x``."""
        if self.size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / self.size

    def largest(self, x: int) -> int:
        """The largest of all processes' ``x``; the host waits for it."""
        if self._hosts is None:
            return x
        both = torch.tensor(x)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._hosts)
        return int(both)

    def vote(self, number: int) -> int:
        """The largest ``number`` that a process gave: of this call with one process, with several of the one before.

        A signal reaches the processes at different moments, and they have to stop at the same step. Nobody waits: what
        they said a step ago has long arrived.
        """
        if self._hosts is None:
            return number
        before, ballot = self._vote, torch.tensor(number)
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._hosts, async_op=True)
        assert work is not None  # it is asynchronous
        self._vote = ballot, work
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """The world of this process: that of ``torchrun``, whose variables the environment has then, or itself alone.

    ``device`` as ``--device``: under torchrun each process takes the GPU of its number on this machine.
    """
    given = [name for name in _VARIABLES if name in os.environ]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        own = pick_device(device)
        if own.type == "cuda" and own.index is not None:
            torch.cuda.set_device(own)
        yield World(own)
        return
    if missing := [name for name in _VARIABLES if name not in given]:
        raise UserError(f"the environment has {', '.join(given)} but not {', '.join(missing)}: start it with torchrun")
    numbers = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not all(number.isdecimal() for number in numbers.values()):
        told = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise UserError(f"the environment has {told}, which are not all numbers: start it with torchrun")
    rank, local, size = map(int, numbers.values())
    own = _own_device(device, local)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    # torchrun's store outlives a restart: what the processes before have left there must not be taken for these ones'.
    store, *_ = next(dist.rendezvous("env://"))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    store = dist.PrefixStore(f"restart {restarts}", store)
    backends = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backends, store=store, rank=rank, world_size=size)
    try:
        yield World(own, rank, size, restarts)
    finally:
        dist.destroy_process_group()


def _own_device(name: str, local: int) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(f"--device must be auto, cpu or cuda under torchrun (each process takes its own), got {name}")
    if local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise UserError(f"--nproc-per-node must be at most {gpus}, the GPUs of this machine: there is none for {local}")
    return torch.device("cuda", local)
