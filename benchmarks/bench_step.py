"""One training step of ATST-Frame: ours beside the structure of the official code (official.py).

Both start from the same weights and see 10 s clips with the same masks. A step is forward, backward, AdamW
(HuggingFace's form) and the teacher update; in the second group it starts at the waveforms, which the official
structure takes clip by clip. tests/models/test_atst_frame.py holds both to the same numbers.
"""

import gc

import pytest
import torch

from atst_fast.models import ARCHS, ATSTFrame
from atst_fast.optim import AdamWEMA, param_groups
from atst_fast.train.front_end import FrontEnd
from benchmarks import official, official_front_end

# sizes of the encoder, clips, frames, widths of the heads
SIZES = {
    "tiny": ({"dim": 48, "depth": 2, "num_heads": 3}, 2, 101, {"hidden": 64, "out": 32}),
    "small": (ARCHS["small"], 4, 1001, {"hidden": 4096, "out": 256}),
    "base": (ARCHS["base"], 2, 1001, {"hidden": 4096, "out": 256}),
}
RATES = {"lr": 1e-4, "weight_decay": 0.04}
MOMENTUM = 0.997
ROUNDS = {"rounds": 11, "warmup_rounds": 3}  # the allocator needs about three steps until it asks for no more pages


def make_mask(clips, tokens):
    """Spans of five tokens over about half of all, as in pretraining."""
    mask = torch.zeros(clips, tokens, dtype=torch.bool)
    for row in mask:
        for start in torch.randperm(tokens - 5)[: int(0.65 * tokens / 5)].tolist():
            row[start : start + 5] = True
    return mask


def ours(system, sizes, heads):
    teacher = dict(zip(*system.teacher_pairs()))
    groups = param_groups(system.student, RATES["weight_decay"])
    optimizer = AdamWEMA(groups, lr=RATES["lr"], form="hf", teacher=teacher, momentum=MOMENTUM)

    def step(batch):
        loss = system(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def official_structure(system, sizes, heads):
    plain = official.System(sizes, **heads)
    plain.load_state_dict(system.state_dict())
    optimizer = official.AdamW(official.groups(plain.student), **RATES)
    return lambda batch: official.train_step(plain, optimizer, batch, MOMENTUM)


STEPS = {"atst_fast": ours, "official_structure": official_structure}


def make_step(provider, size):
    sizes, _, _, heads = SIZES[size]
    return STEPS[provider](ATSTFrame(sizes, **heads), sizes, heads)


def products(size, mask):
    """Floating-point operations of the matrix products that a step needs, without stochastic depth."""
    sizes, _, _, heads = SIZES[size]
    dim, depth, (clips, tokens) = sizes["dim"], sizes["depth"], mask.shape
    rows, read = 2 * clips * tokens, 2 * int(mask.sum())
    hidden, out = heads.values()
    block = 12 * dim**2 * rows + 2 * dim * tokens * rows
    last = 2 * dim**2 * rows + 10 * dim**2 * read + 2 * dim * tokens * read
    encoder = 256 * dim * rows + block * (depth - 1) + last
    projector, predictor = (dim + out) * hidden * read, 2 * out * hidden * read
    return 2 * (encoder * 4 + projector * 4 + predictor * 3)  # teacher forward; student forward, and twice that back


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("provider", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_step(benchmark, provider, size):
    _, clips, frames, _ = SIZES[size]
    mask = make_mask(clips, frames // 4)
    batch = *torch.randn(2, clips, 1, 64, frames), torch.full((clips,), frames), mask
    seconds = clips * frames / 100
    benchmark.extra_info.update(flops=products(size, mask), items=(seconds, "s audio"), note=f"{clips} clips")
    loss = benchmark.pedantic(make_step(provider, size), (batch,), **ROUNDS)
    assert 0 < loss < 4
    gc.collect()


def our_front_end():
    front_end = FrontEnd(bank_size=64)
    return lambda waves: front_end(waves)[:4]  # without the capacity, which a CPU has no use for


def official_clips():
    front_end = official_front_end.FrontEnd(bank_size=64)
    return lambda waves: official_front_end.collate([front_end(wave.float() / 32768) for wave in waves])


FRONT_ENDS = {"atst_fast": our_front_end, "official_structure": official_clips}


@pytest.mark.benchmark(group="step from waveforms")
@pytest.mark.parametrize("provider", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_step_from_waveforms(benchmark, provider, size):
    _, clips, frames, _ = SIZES[size]
    waves = (torch.randn(clips, (frames - 1) * 160) * 3000).clamp(-32768, 32767).to(torch.int16)
    front_end, step = FRONT_ENDS[provider](), make_step(provider, size)
    front_end(waves)  # something to mix with
    benchmark.extra_info.update(items=(clips * frames / 100, "s audio"), note=f"{clips} clips")
    loss = benchmark.pedantic(lambda: step(front_end(waves)), **ROUNDS)
    assert 0 < loss < 4
    gc.collect()
