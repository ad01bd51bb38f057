"""What keeping freed memory (atst_fast/train/memory.py) is worth to a step: ``python -m benchmarks.allocator``.

A step of ATST-Frame small with 16 clips of 10 s, ours and the official structure, with glibc's allocator as it is and
with atst-fast's setting. The setting is the process's, so each of the four runs in one of its own, and none is a
pytest-benchmark item. The median of the last steps is printed: the allocator adapts over the first ones.
"""

import resource
import statistics
import subprocess
import sys
import time

import torch

from atst_fast.train.memory import keep_freed_memory
from benchmarks import bench_step

CLIPS, STEPS, COUNTED = 16, 10, 5


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def run(provider, keep):
    if keep:
        keep_freed_memory()
    _, _, frames, _ = bench_step.SIZES["small"]
    batch = (
        *torch.randn(2, CLIPS, 1, 64, frames),
        torch.full((CLIPS,), frames),
        bench_step.make_mask(CLIPS, frames // 4),
    )
    step = bench_step.make_step(provider, "small")
    times, pages = [], []
    for _ in range(STEPS):
        start, before = time.perf_counter(), faults()
        step(batch)
        times.append(time.perf_counter() - start)
        pages.append(faults() - before)
    seconds, new = statistics.median(times[-COUNTED:]), statistics.median(pages[-COUNTED:])
    print(f"{provider:20}{'kept' if keep else 'given back':12}{seconds:6.2f} s{new:12,.0f} page faults", flush=True)


def main():
    if len(sys.argv) == 3:
        run(sys.argv[1], sys.argv[2] == "keep")
        return
    print(f"a step, {CLIPS} clips; freed memory is", flush=True)
    for keep in ("give", "keep"):
        for provider in bench_step.STEPS:
            subprocess.run([sys.executable, "-m", "benchmarks.allocator", provider, keep], check=True)


if __name__ == "__main__":
    main()
