"""What this machine or its GPU is, and what it can do at most: bandwidths and sgemm rate, measured now."""

import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import atst_fast
from atst_fast.bench import timing

ROOT = Path(__file__).parents[2]
_CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}


_named = ""


def name_commit(commit: str) -> None:
    """What is measured, for a copy of the tree that has no git."""
    global _named
    _named = commit


def describe(thread_counts: Iterable[int] = ()) -> dict:
    """Device, commit, versions, threads and the measured rates: with torch's number of threads, and with others."""
    info = atst_fast.build_info()
    own = torch.get_num_threads()
    others = sorted({*thread_counts} - {own})
    return {
        "device": {"name": _cpu_model(), "cores": os.cpu_count(), "isa": info["isa"]},
        **_software(info),
        "rates": rates(),
        "rates_of_threads": {str(number): _rates_with(number) for number in others},
    }


def rates() -> dict:
    """Of the CPU: bytes and floating-point operations per second."""
    return {**bandwidths(), "sgemm_flops": sgemm_rate()}


def _rates_with(threads: int) -> dict:
    with timing.on_threads(threads):
        return rates()


def describe_gpu() -> dict:
    """The same of the first GPU: its name, multiprocessors, clocks, driver, and its own rates."""
    info, gpu = atst_fast.build_info(), torch.cuda.get_device_properties(0)
    software = _software(info)
    stopwatch = timing.Cuda()

    def median(call):
        return timing.launched(call, stopwatch, budget=0.5).median

    measured = {
        **bandwidths(1 << 28, "cuda", median),
        "sgemm_flops": sgemm_rate(8192, "cuda", median),
        "bf16_flops": sgemm_rate(8192, "cuda", median, torch.bfloat16),
    }
    clocks = nvidia_smi()  # now, for an idle GPU clocks itself down
    software["versions"] |= {"cuda": torch.version.cuda, "driver": clocks.pop("driver_version", "unknown")}
    software["versions"]["triton"] = _version("triton")
    return {
        "device": {
            "name": gpu.name,
            "cores": gpu.multi_processor_count,
            "isa": f"sm_{gpu.major}{gpu.minor}",
            "kernels": info["cuda"],
            "tf32": torch.backends.cuda.matmul.allow_tf32,  # of float32 products; some containers switch it on
            **clocks,
        },
        **software,
        "rates": measured,
    }


def _software(info: dict) -> dict:
    return {
        "commit": _commit(),
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "compiler": info["compiler"],
            "atst_fast": atst_fast.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def nvidia_smi() -> dict:
    """Driver, and the first GPU's clocks (now and at most, MHz) and power limit (W); empty without nvidia-smi."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {name.replace(".", "_"): value.strip() for name, value in zip(names, said.split(","))}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def bandwidths(elements: int = 1 << 26, device: str = "cpu", median: Callable | None = None) -> dict:
    """Bytes read plus bytes written per second, to and from memory (not the caches), in three mixes.

    A copy also reads its target's lines, which nobody counts; where a core's outstanding reads are the limit, writing
    back in place comes for free. So the best of them, not the copy, is the bandwidth that floors are computed with.
    """
    a, b = torch.zeros(elements, device=device), torch.ones(elements, device=device)
    median = median or _median
    return {
        "copy_bytes_per_s": 8 * elements / median(lambda: a.copy_(b)),
        "add_bytes_per_s": 12 * elements / median(lambda: a.add_(b)),
        "scale_bytes_per_s": 8 * elements / median(lambda: b.mul_(1.0)),
    }


def sgemm_rate(
    n: int = 2048, device: str = "cpu", median: Callable | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Floating-point operations per second of a matrix product."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / (median or _median)(lambda: torch.mm(a, b, out=out))


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
    """The commit, and whether files differ from it; of an installed package its version. In a copy without git: what
    name_commit was told, or a hash of the files that are measured, which says whether two results are of the same."""
    if _named:
        return {"id": _named, "dirty": False}
    if not (ROOT / "csrc").is_dir():
        return {"id": f"version-{atst_fast.__version__}", "dirty": False}
    try:
        name = _git("rev-parse", "--short=10", "HEAD").strip()
        dirty = bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results").strip())
    except (OSError, subprocess.CalledProcessError):
        return {"id": f"files-{_hash()}", "dirty": False}
    return {"id": name, "dirty": dirty}


def _hash() -> str:
    paths = [path for folder in ("atst_fast", "csrc", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    total = hashlib.sha256()
    for path in sorted(p for p in paths if p.suffix in _CODE):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:10]


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout
