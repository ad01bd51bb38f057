"""A trace of the torch profiler, summed up: which part of a training step takes how long."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What a kernel (on a GPU) or an operator (on a CPU) belongs to, by the first pattern that its name holds.
_PARTS = {
    "front end": r"log_mel|augment|stft|fft|rand|philox|uniform|sort|topk|index_copy|searchsorted|cumsum|scan",
    "attention": r"frame_attention|scaled_dot_product|flash|fmha|softmax",
    "patch_embed": r"patch_embed|order_kernel",
    "add_norm": r"add_norm|add_branch|layer_?norm|partial_sums",
    "gelu": r"(?<!linear_)gelu",
    "heads": r"batch_?norm|moments_kernel|select_rows",
    "loss": r"frame_loss|normalize|vector_norm",
    "optimizer": r"adamw|ema_|norm_kernel|multi_tensor|_foreach_",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|\b(add|b|baddb)?mm\b|matmul|linear",
    "copies": r"memcpy|memset|copy|fill|zero|\bcat\b|CatArray|clone|contiguous|index_select|gather|scatter",
}
OTHER, IDLE = "other", "idle"
PARTS = (*_PARTS, OTHER, IDLE)
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _PARTS.items()}
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
WINDOW = "profiled steps"


class Item(NamedTuple):
    """A kernel or operator: its part, how often a step runs it, and the seconds that takes."""

    name: str
    part: str
    calls: float
    seconds: float


class Breakdown(NamedTuple):
    """Of one step: ``seconds`` by the clock, ``parts`` in the order of `PARTS`, ``items`` by time, the longest first.

    Parts may add up to more than the step where kernels run side by side; idle is when none ran.
    """

    seconds: float
    parts: dict[str, float]
    items: list[Item]


def part_of(name: str) -> str:
    return next((part for part, pattern in _PATTERNS.items() if pattern.search(name)), OTHER)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a chrome trace, compressed or not."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


def breakdown(events: Iterable[dict[str, Any]], steps: int) -> Breakdown:
    """Of a trace of so many steps: its kernels if there are any, else its operators, each without those it calls.

    The clock runs from the first to the last kernel, or on a CPU over the range called `WINDOW`.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in complete if e.get("cat") in _ON_GPU]
    if spans:
        begin, end = min(s[1] for s in spans), max(s[2] for s in spans)
        times: Iterable[tuple[str, float]] = ((name, stop - start) for name, start, stop in spans)
    else:
        window = next(e for e in complete if e["name"] == WINDOW)
        begin, end = window["ts"], window["ts"] + window["dur"]
        operators = [e for e in complete if e.get("cat") == "cpu_op" and begin <= e["ts"] < end]
        spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in operators]
        times = _alone(operators)
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for name, microseconds in times:
        calls[name] += 1
        total[name] += microseconds
    each = 1 / steps
    items = [Item(name, part_of(name), calls[name] * each, total[name] * each * 1e-6) for name in total]
    items.sort(key=lambda item: -item.seconds)
    parts = dict.fromkeys(PARTS, 0.0)
    for item in items:
        parts[item.part] += item.seconds
    parts[IDLE] = (end - begin - _covered(spans)) * each * 1e-6
    return Breakdown((end - begin) * each * 1e-6, parts, items)


def _alone(operators: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Microseconds of each operator without those inside it, thread by thread."""
    for thread in {e["tid"] for e in operators}:
        mine = sorted((e for e in operators if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"]))
        left = [e["dur"] for e in mine]
        around: list[int] = []  # indices of the operators that are running
        for i, e in enumerate(mine):
            while around and mine[around[-1]]["ts"] + mine[around[-1]]["dur"] <= e["ts"]:
                around.pop()
            if around:
                left[around[-1]] -= e["dur"]
            around.append(i)
        yield from ((e["name"], max(microseconds, 0.0)) for e, microseconds in zip(mine, left))


def _covered(spans: list[tuple[str, float, float]]) -> float:
    """How long at least one of them lasts."""
    total, until = 0.0, float("-inf")
    for _, start, stop in sorted(spans, key=lambda span: span[1]):
        total += max(stop - max(start, until), 0.0)
        until = max(until, stop)
    return total
