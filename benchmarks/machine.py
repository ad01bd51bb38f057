"""What this machine is, and what it can do at most: bandwidths and sgemm rate, measured now."""

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

import atst_fast

ROOT = Path(__file__).parent.parent


def describe() -> dict:
    """Device, commit, versions, threads and the measured rates."""
    info = atst_fast.build_info()
    return {
        "device": {"name": _cpu_model(), "cores": os.cpu_count(), "isa": info["isa"]},
        "commit": _commit(),
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "compiler": info["compiler"],
            "atst_fast": atst_fast.__version__,
        },
        "threads": torch.get_num_threads(),
        "rates": {**bandwidths(), "sgemm_flops": sgemm_rate()},
    }


def bandwidths(elements: int = 1 << 26) -> dict:
    """Bytes read plus bytes written per second, to and from memory (not the caches), in three mixes.

    A copy also reads its target's lines, which nobody counts; where a core's outstanding reads are the limit, writing
    back in place comes for free. So the best of them, not the copy, is the bandwidth that floors are computed with.
    """
    a, b = torch.zeros(elements), torch.ones(elements)
    return {
        "copy_bytes_per_s": 8 * elements / _median(lambda: a.copy_(b)),
        "add_bytes_per_s": 12 * elements / _median(lambda: a.add_(b)),
        "scale_bytes_per_s": 8 * elements / _median(lambda: b.mul_(1.0)),
    }


def sgemm_rate(n: int = 2048) -> float:
    """Floating-point operations per second of a float32 matrix product."""
    a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
    return 2 * n**3 / _median(lambda: torch.mm(a, b, out=out))


def _median(call, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> dict:
    """The commit, and whether files differ from it; unknown outside of a git checkout."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD").strip()
        dirty = bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results").strip())
    except (OSError, subprocess.CalledProcessError):
        return {"id": "unknown", "dirty": False}
    return {"id": name, "dirty": dirty}


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout
