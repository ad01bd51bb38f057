"""What stands in for a machine: a clock that goes as it is told, a CPU that passes for a GPU, results of both."""

from atst_fast.bench import report, timing
from atst_fast.bench.session import LeftOut, Measured

# what a batch of log-mels counts
LOG_MEL = {"bytes": 129e6, "flops": 5.2e9, "items": (1440, "s audio"), "parity": {"error": 1e-6, "allowed": 1e-3}}
CPU = {
    "device": {"name": "Some(R) CPU", "cores": 2, "isa": "avx2"},
    "commit": {"id": "abc", "dirty": True},
    "versions": {"torch": "2"},
    "threads": 2,
    "rates": {"copy_bytes_per_s": 1e9, "add_bytes_per_s": 2e9, "scale_bytes_per_s": 1e9, "sgemm_flops": 1e12},
}
GPU = {
    "device": {"name": "Some GPU", "cores": 132, "isa": "sm_90", "kernels": "sm_90", "clocks_sm": "1980"},
    "commit": {"id": "abc", "dirty": False},
    "versions": {"torch": "2"},
    "threads": 8,
    "rates": {
        "copy_bytes_per_s": 4e12,
        "add_bytes_per_s": 4.2e12,
        "scale_bytes_per_s": 4.1e12,
        "sgemm_flops": 5e13,
        "bf16_flops": 7e14,
    },
}


def case(provider, median, size="base", *, group="op", iqr=None, more=None, **extra):
    """A case of a made-up operator that was measured."""
    stats = timing.Stats(median, median / 10 if iqr is None else iqr, median, 5)
    params = {"size": size, **(more or {}), "provider": provider}
    return Measured(group, f"test_{group.replace(' ', '_')}[{provider}-{size}]", params, extra, stats)


def cpu_result(*cases, **machine):
    return report.collect(cases, {**CPU, "date": "2030-01-01T00:00:00+00:00", **machine})


def gpu_result():
    """Ours in one and a half times the time that its bytes take at 4 TB/s, torch.stft in nine times that."""
    least = LOG_MEL["bytes"] / 4e12
    cases = [
        case(provider, factor * least, "batch", group="log_mel", **LOG_MEL)
        for provider, factor in (("atst_fast", 1.5), ("torch_stft", 9.0))
    ]
    return report.collect(cases, {**GPU, "date": "2030-01-01T00:00:00+00:00"})


def left_out(why, fault, provider="peer", size="base"):
    return LeftOut("op", f"test_op[{provider}]", {"size": size, "provider": provider}, why, fault)


class Clock:
    """A GPU on which each call takes as long as it says."""

    def __init__(self):
        self.now, self.cleared = 0.0, 0

    def call(self, *seconds):
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def clear_cache(self):
        self.cleared += 1
        self.now += 100.0

    def mark(self):
        return self.now

    def seconds(self, begin, end):
        return end - begin

    def captured(self, call, times):
        return lambda: [call() for _ in range(times)]


class PretendedGpu(str):
    """The device "cpu" to torch, and equal to "cuda" for whoever asks: the cases of a GPU with tensors of the CPU."""

    __slots__ = ()

    def __new__(cls):
        return super().__new__(cls, "cpu")

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    def __hash__(self):
        return hash("cuda")
