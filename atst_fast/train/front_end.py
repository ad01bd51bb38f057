"""Waveforms to what a training step sees: two views of their log-mel, and what belongs to them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.train.masks import block_mask, capacity
from atst_fast.train.views import Views


class FrontEndBatch(NamedTuple):
    """What ``models.ATSTFrame.forward`` takes: ``view1``, ``view2`` ``[B, 1, F, T]`` float32; ``lengths`` int64 ``[B]``
    mel frames, None: all of them; ``mask`` bool ``[B, L]``; ``capacity``: how many patches ``mask`` has masked at most,
    where nobody can count them: on a GPU."""

    view1: Tensor
    view2: Tensor
    lengths: Tensor | None
    mask: Tensor
    capacity: int | None = None


class ClipBatch(NamedTuple):
    """What ``models.ATSTClip.forward`` takes: ``view1``, ``view2`` ``[B, 1, F, T]`` float32, the shorter one padded;
    ``lengths1``, ``lengths2`` int64 ``[B]`` their mel frames on the views' device, None: all of them."""

    view1: Tensor
    view2: Tensor
    lengths1: Tensor | None
    lengths2: Tensor | None


class FrontEnd(Views):
    """The official transform of ATST-Frame for a whole batch (audiossl/methods/atstframe/transform.py).

    By default as published: view 1 is the plain log-mel (``aug_tea=False``), view 2 is mixed with an earlier clip and
    warped in frequency (``aug_stu=True``), both have the same mask. ``mixup`` and ``freq_warp`` leave either out.
    Devices, random numbers and state: ``Views``.

    ``fixed_size``: whether batches have a ``capacity`` in the place of ``lengths``; None: on a GPU only.
    """

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        n_mels: int = 64,
        win_length: int | None = None,
        patch_width: int = 4,
        mask_ratio: float = 0.65,
        mask_len: int = 5,
        mask_type: str = "block",
        aug_tea: bool = False,
        aug_stu: bool = True,
        mixup: bool = True,
        freq_warp: bool = True,
        bank_size: int = 2000,
        seed: int = 0,
        fixed_size: bool | None = None,
    ):
        super().__init__(
            augmented=(aug_tea, aug_stu),
            mixup=mixup,
            bank_size=bank_size,
            crops={"freq_scale": (0.6, 1.5) if freq_warp else None},
            seed=seed,
            sample_rate=sample_rate,
            n_mels=n_mels,
            win_length=win_length,
        )
        if patch_width < 1:
            _checks.fail("FrontEnd", "patch_width", "at least 1", patch_width)
        self.patch_width = patch_width
        self.masks: dict[str, Any] = {"mask_ratio": mask_ratio, "mask_len": mask_len, "mask_type": mask_type}
        self.fixed_size = fixed_size

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> FrontEndBatch:
        """``[B, N]`` float32 or int16, clips padded with zeros at their end to the crop's length, as upstream does:
        all frames count as valid."""
        _checks.tensor("FrontEnd", "waveform", waveform, "[B, N] (clips, samples)", dim=2)
        mel = self.log_mel(waveform[:, None])
        clips, _, _, frames = mel.shape
        patches = frames // self.patch_width
        mask = block_mask(clips, patches, **self.masks, generator=self.generator_on(mel.device))
        view1, view2 = self.view(0, mel), self.view(1, mel)
        if mel.device.type != "cpu" if self.fixed_size is None else self.fixed_size:
            return FrontEndBatch(view1, view2, None, mask, capacity(clips, patches, **self.masks))
        return FrontEndBatch(view1, view2, torch.full((clips,), frames), mask)


class ClipFrontEnd(Views):
    """The official transform of ATST-Clip for a whole batch (audiossl/methods/atst/transform.py): two crops of a clip,
    each mixed with an earlier crop of its kind, laid on a canvas half as long again, cropped and resized in both axes.

    ``samples``: of the two crops. The shorter one's view is padded at its end with zeros of the normalised scale
    (about -14.5 dB, as upstream) to the other's frames. Devices, random numbers and state: ``Views``.
    """

    def __init__(
        self,
        samples: Sequence[int],
        *,
        sample_rate: int = 16000,
        n_mels: int = 64,
        win_length: int | None = None,
        bank_size: int = 2000,
        seed: int = 0,
    ):
        super().__init__(
            augmented=(True, True),
            mixup=True,
            bank_size=bank_size,
            crops={"canvas_scale": (1.0, 1.5), "freq_scale": (0.6, 1.5), "time_scale": (0.6, 1.5)},
            seed=seed,
            sample_rate=sample_rate,
            n_mels=n_mels,
            win_length=win_length,
        )
        if len(samples) != 2 or min(samples) < 1:
            _checks.fail("ClipFrontEnd", "samples", "two positive numbers, the samples of both crops", samples)
        self.samples = tuple(samples)

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> ClipBatch:
        """``[B, N1 + N2]`` float32 or int16, both crops of a clip side by side; a clip that is shorter than its crop
        was padded with zeros, which count as audio."""
        expected = f"[B, {sum(self.samples)}] (clips, the samples of both crops side by side)"
        _checks.tensor("ClipFrontEnd", "waveform", waveform, expected, dim=2)
        if waveform.shape[1] != sum(self.samples):
            _checks.fail("ClipFrontEnd", "waveform", expected, waveform)
        crops = waveform[:, None].split(self.samples, dim=2)
        views = [self.view(i, self.log_mel(crop)) for i, crop in enumerate(crops)]
        frames = max(view.shape[3] for view in views)
        (view1, lengths1), (view2, lengths2) = (_padded(view, frames) for view in views)
        return ClipBatch(view1, view2, lengths1, lengths2)


def _padded(view: Tensor, frames: int) -> tuple[Tensor, Tensor | None]:
    """The view in so many frames, and how many of them are its own; None: all."""
    own = view.shape[3]
    if own == frames:
        return view, None
    return F.pad(view, (0, frames - own)), torch.full((len(view),), own, device=view.device)
