"""Training steps of ATST-Frame on a GPU, from int16 waveforms in pinned memory: ours beside plain PyTorch at its best
(tuned.py) and the structure of the official code as it is shipped (float32, its front end in loader processes).

Each case runs in a process of its own, so that one that fails, runs out of memory or takes too long costs no other, and
none sees what another has left of the GPU's memory:

    python -m benchmarks.gpu.bench_step PROVIDER SIZE

prints one as JSON. A batch that does not fit is halved to a power of two until it does, and the case says so. Memory is
what torch's allocator keeps reserved in steady state, CUDA graphs included. max-autotune compiles for minutes; what it
has compiled stays in its cache, so that a case that was stopped gets further the next time.
"""

import gc
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from atst_fast.bench import machine, timing
from atst_fast.train import synthetic
from atst_fast.train.masks import block_mask, capacity
from benchmarks import bench_step as cpu
from benchmarks import official, official_front_end, tuned, tuned_front_end

CLIPS = {"tiny": 2, "small": 256, "base": 144}
PEAK = 989e12  # an H200's datasheet: bfloat16 products without sparsity
WARM_UP = 6  # steps; ours records its graph in the fourth
WORKERS = 16


def samples_of(size):
    return (cpu.SIZES[size][2] - 1) * 160


def ours(precision, graph):
    def make(size, clips, device):
        sizes, _, _, heads = cpu.SIZES[size]
        settings = {"samples": [samples_of(size)], "precision": precision, "device": device, "graph": graph}
        stepper = synthetic.make_stepper(sizes, **settings, **heads)
        batches = synthetic.batches(clips, samples_of(size), device)

        def step():
            batch = next(batches)
            return stepper(batch.waveform, batch.step).loss

        return step

    return make


def tuned_step(size, clips, device):
    """Compiled, in bfloat16, on a GPU; on a CPU the same without either."""
    sizes, _, frames, heads = cpu.SIZES[size]
    on_gpu = device.type == "cuda"
    attention = tuned.fastest_attention(2 * clips, frames // 4, sizes["num_heads"]) if on_gpu else None
    step = tuned.Step(
        tuned.System(sizes, **heads).to(device),
        tuned_front_end.FrontEnd(clips, samples_of(size)).to(device),
        capacity(clips, frames // 4),
        **cpu.RATES,
        momentum=cpu.MOMENTUM,
        tuned=on_gpu,
        attention=attention,
    )
    batches = synthetic.batches(clips, samples_of(size), device)
    return lambda: step(next(batches).waveform)


class Clips(torch.utils.data.Dataset):
    """Clips without end, each through the front end when it is asked for."""

    def __init__(self, samples):
        self.waves = (torch.randn(8, samples) * 3000).clamp(-32768, 32767).to(torch.int16)
        self.front_end = official_front_end.FrontEnd()

    def __len__(self):
        return 1 << 40

    def __getitem__(self, index):
        return self.front_end(self.waves[index % len(self.waves)].float() / 32768)


def official_step(size, clips, device):
    sizes, _, _, heads = cpu.SIZES[size]
    on_gpu = device.type == "cuda"
    with device:
        system = official.System(sizes, **heads)
    optimizer = official.AdamW(official.groups(system.student), **cpu.RATES)
    order = (range(i, i + clips) for i in itertools.count(0, clips))
    workers = {"num_workers": WORKERS if on_gpu else 0, "pin_memory": on_gpu}
    loader = iter(
        torch.utils.data.DataLoader(
            Clips(samples_of(size)), batch_sampler=order, collate_fn=official_front_end.collate, **workers
        )
    )

    def step():
        batch = [x.to(device, non_blocking=True) for x in next(loader)]
        return official.train_step(system, optimizer, batch, cpu.MOMENTUM)

    return step


PROVIDERS = {
    "atst_fast": ours("bf16", graph=True),
    "atst_fast_eager": ours("bf16", graph=False),
    "atst_fast_float32": ours("float32", graph=True),
    "tuned_pytorch": tuned_step,
    "official_structure": official_step,
}
HALF = {"atst_fast", "atst_fast_eager", "tuned_pytorch"}
# seconds of a case, all in all; those of one size take less than ten minutes together
LIMITS = dict(zip(PROVIDERS, (80, 40, 60, 290, 110)))


def work(provider, size, clips):
    """What a case counts, for its share of the roofline."""
    tokens = cpu.SIZES[size][2] // 4
    mask = block_mask(clips, tokens, generator=torch.Generator().manual_seed(0))
    extra = {"items": (clips, "clips"), "flops": cpu.products(size, mask), "peak_flops": PEAK, "clips": clips}
    return extra | {"dtype": "bfloat16" if provider in HALF else "float32"}


def fitting(make, clips):
    """``make(clips)`` and how many clips it took: fewer, by powers of two, where memory does not suffice."""
    while True:
        try:
            return make(clips), clips
        except torch.OutOfMemoryError:
            if clips <= 1:
                raise
        clips = 1 << int(math.log2(clips - 1))
        gc.collect()
        torch.cuda.empty_cache()


def warmed_up(provider, size, clips, device):
    """The step after its first ones, and how many seconds those took."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    step = PROVIDERS[provider](size, clips, device)
    losses = [float(step()) for _ in range(WARM_UP)]
    if not all(0 < loss < 4 for loss in losses):
        raise RuntimeError(f"{provider}: losses of {losses}")
    return step, time.perf_counter() - begin


def run(provider, size):
    """Times and numbers of one case, by this process."""
    device, asked = torch.device("cuda"), CLIPS[size]
    (step, first), clips = fitting(lambda clips: warmed_up(provider, size, clips, device), asked)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stats = timing.launched(step, timing.Cuda(), budget=3.0)
    extra = work(provider, size, clips) | {
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "first_steps_s": first,
        "note": f"{clips} clips{f' ({asked} do not fit)' if clips < asked else ''}, ready after {first:.0f} s",
    }
    return {"stats": asdict(stats), "extra_info": extra}


def run_apart(provider, size):
    """The same by a process of its own, which is stopped at its limit."""
    command = [sys.executable, "-m", "benchmarks.gpu.bench_step", provider, size]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=LIMITS[provider])
    if done.returncode:
        pytest.fail(f"{provider}: {done.stdout[-1000:]}{done.stderr[-3000:]}", pytrace=False)
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"stats"')))


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", CLIPS)
def test_step(request, size, provider):
    if not request.config.getoption("benchmark_enable"):
        assert 0 < float(PROVIDERS[provider](size, CLIPS[size], torch.device("cuda"))()) < 4
        return
    keep = request.getfixturevalue("measured_apart")
    torch.cuda.empty_cache()
    result = run_apart(provider, size)
    keep(timing.Stats(**result["stats"]), result["extra_info"])


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
