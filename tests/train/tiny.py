"""A system small enough for tests, and clips that it can learn something from."""

import torch

from atst_fast.models import ATSTClip, ATSTFrame
from atst_fast.train.front_end import ClipFrontEnd, FrontEnd
from atst_fast.train.graph import Stepper
from atst_fast.train.precision import Trainee
from atst_fast.train.schedule import Schedules

SECONDS, CLIPS = 0.8, 8
CROPS = (7200, 5600)  # of ATST-Clip: the same samples, as two crops side by side


def clips(step, batch=CLIPS, seconds=SECONDS):
    """Three tones a clip that go on and off at their own pace, in a little noise: int16 ``[batch, N]``."""
    generator = torch.Generator().manual_seed(step)
    t = torch.arange(int(16000 * seconds)) / 16000
    octave, pace, phase = torch.rand(3, batch, 3, 1, generator=generator)
    on = torch.sin(2 * torch.pi * ((1 + 8 * pace) * t + phase)) > 0
    tones = 0.2 * torch.sin(2 * torch.pi * 100 * 2 ** (5 * octave) * t) * on
    noise = 0.01 * torch.randn(batch, len(t), generator=generator)
    return ((tones.sum(1) + noise).clamp(-1, 1) * 32767).to(torch.int16)


def stepper(precision="float32", *, method="frame", steps=200, device="cpu", graph=None, drop_path=0.1, **front_end):
    """Everything of a run, always with the same weights and draws."""
    torch.manual_seed(0)
    size = {"dim": 64, "depth": 2, "num_heads": 2}
    system, samples = (ATSTFrame, int(16000 * SECONDS)) if method == "frame" else (ATSTClip, max(CROPS))
    model = system(size, hidden=128, out=32, max_frames=samples // 160 + 1, drop_path_rate=drop_path).to(device)
    schedules = Schedules(steps=steps, lr=2e-3, warmup_steps=steps // 10, momentum=0.99)
    views = FrontEnd if method == "frame" else lambda **kwargs: ClipFrontEnd(CROPS, **kwargs)
    front = views(bank_size=32, **front_end).to(device)
    return Stepper(front, Trainee(model, schedules, precision), schedules, graph=graph)


def curve(step, steps, first=0):
    """Loss and output deviations ``[steps, 3]`` of so many steps."""
    device = step.device
    results = [step(clips(k).to(device), k) for k in range(first, first + steps)]
    return torch.stack([torch.stack(r[:3]) for r in results]).cpu()


def assert_equal(x, y, where):
    """Tensors, containers of them and plain values, bit for bit."""
    if isinstance(x, torch.Tensor):
        assert torch.equal(x, y), where
    elif isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for k in x:
            assert_equal(x[k], y[k], f"{where}.{k}")
    elif isinstance(x, list | tuple):
        assert len(x) == len(y), where
        for i, pair in enumerate(zip(x, y)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert x == y, where
