"""Training steps on made-up audio: the whole step of pretraining, for whoever wants to see how long it takes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from atst_fast.train.batch import Batch
from atst_fast.train.front_end import ClipFrontEnd, FrontEnd
from atst_fast.train.graph import CudaGraph, Stepper
from atst_fast.train.method import METHODS
from atst_fast.train.precision import Trainee
from atst_fast.train.schedule import Schedules
from atst_fast.train.upload import upload


def make_stepper(
    arch: str | Mapping[str, int],
    *,
    samples: Sequence[int],
    precision: str,
    device: torch.device,
    graph: bool,
    method: str = "frame",
    bank_size: int = 2000,
    **model: Any,
) -> Stepper:
    """A step as ``atst-fast pretrain`` takes it on clips whose crops have so many ``samples`` (one of ATST-Frame, two
    of ATST-Clip), with random weights.

    ``precision``: "float32" or "bf16"; ``graph``: in a CUDA graph, on a GPU; ``method``: "frame" or "clip";
    ``model``: further arguments of its model.
    """
    system = METHODS[method].model(arch, max_frames=max(samples) // 160 + 1, **model).to(device)
    views = FrontEnd(bank_size=bank_size) if method == "frame" else ClipFrontEnd(samples, bank_size=bank_size)
    front_end = views.to(device)
    schedules = Schedules(steps=100_000, lr=1e-4, warmup_steps=1000, momentum=0.997)
    recorder = CudaGraph(device) if graph and device.type == "cuda" else None
    return Stepper(front_end, Trainee(system, schedules, precision), schedules, graph=recorder)


def batches(clips: int, samples: int, device: torch.device) -> Iterator[Batch]:
    """Batches of noise int16 ``[clips, samples]`` without end, brought to ``device`` as in pretraining."""
    waves = [(torch.randn(clips, samples) * 3000).clamp(-32768, 32767).to(torch.int16) for _ in range(2)]
    if device.type == "cuda":
        waves = [wave.pin_memory() for wave in waves]
    return upload((Batch(step, waves[step % 2]) for step in itertools.count()), device)
