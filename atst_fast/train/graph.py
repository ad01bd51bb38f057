"""The whole training step, from waveforms: as it is, or in a CUDA graph."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from atst_fast.train.precision import Trainee
from atst_fast.train.schedule import Schedules
from atst_fast.train.step import StepResult, set_rates, update
from atst_fast.train.views import Views

T = TypeVar("T")
Watch = Callable[[str], AbstractContextManager[None]]


def unwatched(part: str) -> AbstractContextManager[None]:
    return nullcontext()


# Steps before one is captured: they make what must be there then (optimizer state, memory banks, compiled kernels,
# workspaces of cuBLAS). One would do; the others let allocations settle.
WARM_UP = 3


class Graph(Protocol):
    """What `Stepper` needs of a CUDA graph; `CudaGraph` is one."""

    def run(self, work: Callable[[], T]) -> T:
        """Do ``work`` at once, where it will be recorded."""
        ...

    def record(self, work: Callable[[], Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """Record ``work``, in place of what was recorded before, without doing it; its result holds numbers after
        `replay`."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph on a stream of its own.

    What runs before the recording runs on that stream too: autograd keeps to the stream on which it has first seen a
    parameter, and a graph must not depend on another one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, work: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = work()
        current.wait_stream(self._stream)
        return out

    def record(self, work: Callable[[], Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:  # that of the device, which drops paths, is registered by torch
            graph.register_generator_state(generator)
        # "thread_local": the thread that prepares batches allocates pinned memory whenever it likes
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            out = work()
        self._graph = graph
        return out

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()


class Stepper:
    """Training steps from waveforms: two views, both networks, gradients, AdamW and teacher.

    ``stepper(waveform, step)`` trains on ``waveform`` ``[B, N]`` int16 (or float32), as ``front_end`` takes it, at the
    rates of ``schedules`` for ``step``. Without ``graph`` that is a plain call. With one, the first steps (`WARM_UP`,
    and again whenever the shape has changed before there is a recording) are plain as well, then the same code is
    recorded, and from then on a step is: waveform to where the recording reads it, rates to where it reads those,
    replay. Batches of another shape than the recorded one are trained plainly; longer ones move the memory banks, and
    the recording is made anew after them. Both ways use the same random numbers and leave the same state.

    Nothing waits for the GPU. The results are tensors of their own, which later steps leave alone. ``watch(part)`` is
    entered around "front end" and "step"; a replay is all "step".
    """

    def __init__(
        self,
        front_end: Views,
        trainee: Trainee,
        schedules: Schedules,
        *,
        graph: Graph | None = None,
        watch: Watch = unwatched,
    ):
        self.front_end, self.trainee, self.schedules, self.watch = front_end, trainee, schedules, watch
        self.device = next(trainee.model.parameters()).device
        self._graph, self._left = graph, WARM_UP
        self._shape: torch.Size | None = None  # of the last steps, or of what is recorded
        self._recorded: tuple[Tensor, Tensor] | None = None  # the waveform that it reads, the numbers that it writes
        self._banks: list[Tensor | None] = []  # that it reads and writes

    def __call__(self, waveform: Tensor, step: int) -> StepResult:
        rates = self.schedules(step)
        set_rates(self.trainee.optimizer, rates)
        numbers = self._plain(waveform) if self._graph is None else self._graphed(waveform, self._graph)
        loss, std_student, std_teacher = numbers.unbind()
        return StepResult(loss, std_student, std_teacher, rates)

    def _plain(self, waveform: Tensor, watch: Watch | None = None) -> Tensor:
        """Loss and diagnostics ``[3]`` of a step."""
        watch = watch or self.watch
        with watch("front end"):
            batch = self.front_end(waveform.to(self.device, non_blocking=True))
        with watch("step"):
            out = update(self.trainee.working, self.trainee.optimizer, batch)
            return torch.stack(out)

    def _graphed(self, waveform: Tensor, graph: Graph) -> Tensor:
        if any(now is not then for now, then in zip(self._memory(), self._banks)):
            self._recorded, self._banks = None, []
        if self._recorded is None and waveform.shape != self._shape:
            self._shape, self._left = waveform.shape, WARM_UP
        if self._left or waveform.shape != self._shape:
            self._left = max(self._left - 1, 0)
            return graph.run(lambda: self._plain(waveform))
        recorded = self._recorded = self._recorded or self._record(waveform, graph)
        with self.watch("step"):
            recorded[0].copy_(waveform, non_blocking=True)
            self.trainee.optimizer.refresh()
            graph.replay()
            return recorded[1].clone()

    def _record(self, waveform: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        static = torch.empty_like(waveform, device=self.device)
        generator = self.front_end.device_generator
        self.trainee.optimizer.zero_grad(set_to_none=True)  # or their memory would be held while others are made
        numbers = graph.record(lambda: self._plain(static, unwatched), [] if generator is None else [generator])
        self._banks = self._memory()
        return static, numbers

    def _memory(self) -> list[Tensor | None]:
        """The banks' clips."""
        return [None if bank is None else bank.mels for bank in self.front_end.banks]
