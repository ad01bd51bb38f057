"""Seconds that a call takes: on a CPU by its clock, on a GPU by CUDA events."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3
ROUNDS = (11, 200)  # at least, at most
REPLAYED = 20  # calls in one graph
HEAD_START = 4_000_000  # cycles, some 2 ms
SHORTEST = 1e-4  # seconds of a round on a CPU: shorter calls are timed several at once
MOST = 1000  # at once


@dataclass(frozen=True)
class Stats:
    """What report.py reads of a case: its median, quartile distance and least time in seconds, and how many rounds."""

    median: float
    iqr: float
    min: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> "Stats":
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, high - low, min(times), len(times))


class Cpu:
    """What a stopwatch needs of a CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class Cuda:
    """What a stopwatch needs of a GPU."""

    def __init__(self) -> None:
        level2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._other = torch.empty(2 * level2, dtype=torch.uint8, device="cuda")

    def clear_cache(self) -> None:
        """Fill the L2 cache with something else, and keep the GPU busy while the CPU launches what is timed."""
        self._other.zero_()
        torch.cuda._sleep(HEAD_START)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def captured(self, call: Callable, times: int) -> Callable:
        """``times`` calls as one graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a call sets up the first time may not be captured
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay


def compiled(call: Callable) -> Callable:
    """For its own sizes alone: what was compiled before for others would make torch take them for variable."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


def repeated(call: Callable, cpu: Any, budget: float = 0.5) -> Stats:
    """Calls one after the other, as in a loop: what fits into the caches stays there."""
    for _ in range(WARM_UP):
        begin = cpu.mark()
        call()
        last = cpu.seconds(begin, cpu.mark())
    times = min(max(round(SHORTEST / max(last, 1e-9)), 1), MOST)

    def several() -> None:
        for _ in range(times):
            call()

    stats = _rounds(call if times == 1 else several, cpu, budget, lambda: None)
    return Stats(stats.median / times, stats.iqr / times, stats.min / times, stats.rounds)


def launched(call: Callable, gpu: Any, budget: float = 0.5) -> Stats:
    """Single calls, with nothing of theirs in the L2 cache: the GPU's time, as in a loop whose CPU runs ahead of it.

    What a call takes the CPU longer than HEAD_START is included.
    """
    for _ in range(WARM_UP):
        call()
    return _rounds(call, gpu, budget, gpu.clear_cache)


def replayed(call: Callable, gpu: Any, budget: float = 0.5) -> Stats:
    """Calls one after the other in a CUDA graph: no launch by the CPU, and what fits into the L2 cache stays there."""
    stats = _rounds(gpu.captured(call, REPLAYED), gpu, budget, lambda: None)
    return Stats(stats.median / REPLAYED, stats.iqr / REPLAYED, stats.min / REPLAYED, stats.rounds)


def _rounds(call: Callable, gpu: Any, budget: float, before: Callable) -> Stats:
    def once() -> tuple:
        before()
        begin = gpu.mark()
        call()
        return begin, gpu.mark()

    first = gpu.seconds(*once())
    rounds = min(max(int(budget / max(first, 1e-9)), ROUNDS[0]), ROUNDS[1])
    return Stats.of([gpu.seconds(*span) for span in [once() for _ in range(rounds)]])


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """torch's threads on a CPU, for as long as it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
