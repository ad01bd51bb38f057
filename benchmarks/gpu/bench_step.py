"""One training step of ATST-Frame in float32 on a GPU: ours beside the structure of the official code."""

import pytest
import torch

from benchmarks import bench_step as cpu

# as on the CPU, with as many clips as a GPU is given
CLIPS = {"tiny": 2, "small": 32, "base": 32}


def make_case(provider, size, device):
    """The step, what it takes, and the floating-point operations of its matrix products."""
    frames = cpu.SIZES[size][2]
    mask = cpu.make_mask(CLIPS[size], frames // 4)
    batch = [*torch.randn(2, CLIPS[size], 1, 64, frames), torch.full((CLIPS[size],), frames), mask]
    with torch.device(device):
        step = cpu.make_step(provider, size)
    # ATSTFrame wants lengths and mask on the CPU, where they are made
    places = [device, device, "cpu", "cpu"] if provider == "atst_fast" else [device] * 4
    return step, [x.to(place) for x, place in zip(batch, places)], cpu.products(size, mask)


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("provider", cpu.STEPS)
@pytest.mark.parametrize("size", cpu.SIZES)
def test_step(measure, size, provider):
    step, batch, flops = make_case(provider, size, "cuda")
    seconds = CLIPS[size] * cpu.SIZES[size][2] / 100
    measure(lambda: step(batch), flops=flops, items=(seconds, "s audio"), note=f"{CLIPS[size]} clips")
