"""Waveforms to the GPU, while it works on the batch before."""

from collections.abc import Iterator

import torch
from torch import Tensor

from atst_fast.train.batch import Batch


def upload(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches`` with their waveforms on ``device``; on a CPU they are passed on as they are.

    On a GPU there are two buffers, and a batch is valid until the one after it is asked for: the work on it must have
    been queued by then, on the stream that is current. A stream of its own copies the batch after it meanwhile, which
    has therefore to be there before this one is handed out. The waveforms should be pinned and of one shape (another
    one gets new buffers).
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    slots, before = [_Slot(stream), _Slot(stream)], None
    for i, batch in enumerate(batches):
        slot = slots[i % 2]
        slot.fill(batch.waveform, device)
        if before is not None:
            yield before.hand_out()
        slot.step, before = batch.step, slot
    if before is not None:
        yield before.hand_out()


class _Slot:
    """A buffer on the GPU."""

    def __init__(self, stream: torch.cuda.Stream):
        self.stream, self.copied, self.step = stream, torch.cuda.Event(), -1
        self.buffer: Tensor | None = None

    def fill(self, waveform: Tensor, device: torch.device) -> None:
        # The copy before the last one is long done unless this thread is more than two steps ahead of the GPU: then it
        # waits here, so that pinned memory does not pile up.
        self.copied.synchronize()
        if self.buffer is None or self.buffer.shape != waveform.shape:
            self.buffer = torch.empty_like(waveform, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # the last step that reads the buffer is queued
        with torch.cuda.stream(self.stream):
            self.buffer.copy_(waveform, non_blocking=True)
            self.copied.record(self.stream)

    def hand_out(self) -> Batch:
        assert self.buffer is not None
        torch.cuda.current_stream(self.buffer.device).wait_event(self.copied)
        return Batch(self.step, self.buffer)
