"""Waveforms to what a training step sees: two views of their log-mel and a mask."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atst_fast.nn import LogMelSpectrogram
from atst_fast.ops.augment import MemoryBank, augment_views, draw_augment
from atst_fast.train.masks import block_mask, capacity


class FrontEndBatch(NamedTuple):
    """``view1``, ``view2`` ``[B, 1, F, T]`` float32; ``lengths`` int64 ``[B]`` mel frames, None: all of them; ``mask``
    bool ``[B, L]``; ``capacity``: how many patches ``mask`` has masked at most, where nobody can count them, see
    ``models.ATSTFrame.forward``: on a GPU."""

    view1: Tensor
    view2: Tensor
    lengths: Tensor | None
    mask: Tensor
    capacity: int | None = None


class FrontEnd(nn.Module):
    """The official transform of ATST-Frame for a whole batch (audiossl/methods/atstframe/transform.py).

    By default as published: view 1 is the plain log-mel (``aug_tea=False``), view 2 is mixed with an earlier clip and
    warped in frequency (``aug_stu=True``), both have the same mask. ``mixup`` and ``freq_warp`` leave either out. Each
    augmented view has a memory bank of ``bank_size`` clips of its own.

    It runs on the device of the waveform, which is that of its buffers, and draws there: from ``generator`` on a CPU,
    on a GPU from ``device_generator``, which has the same seed. The state dict holds generators and banks, so a run
    that is continued sees the same views. Random states of a CPU and a GPU are not interchangeable: one that was saved
    on the other is refused. On a GPU nothing waits for it, and a CUDA graph can hold a call (once the banks exist, so
    not the first one), with ``device_generator`` registered.

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
        super().__init__()
        self.log_mel = LogMelSpectrogram(sample_rate=sample_rate, n_mels=n_mels, win_length=win_length)
        self.patch_width = patch_width
        self.masks: dict[str, Any] = {"mask_ratio": mask_ratio, "mask_len": mask_len, "mask_type": mask_type}
        self.augmented = (aug_tea, aug_stu)
        self.freq_scale = (0.6, 1.5) if freq_warp else None
        self.banks = [MemoryBank(bank_size) if on and mixup else None for on in self.augmented]
        self.generator = torch.Generator().manual_seed(seed)
        self.device_generator: torch.Generator | None = None
        self.fixed_size = fixed_size

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> FrontEndBatch:
        """``[B, N]`` float32 or int16, clips padded with zeros at their end to the crop's length, as upstream does:
        all frames count as valid."""
        mel = self.log_mel(waveform[:, None])
        clips, _, _, frames = mel.shape
        patches = frames // self.patch_width
        generator = self._generator_on(mel.device)
        mask = block_mask(clips, patches, **self.masks, generator=generator)
        draws = [
            draw_augment(mel.shape, bank and bank.to(mel.device), generator, freq_scale=self.freq_scale) if on else None
            for on, bank in zip(self.augmented, self.banks)
        ]
        view1, view2 = augment_views(mel, draws, self.banks)
        if mel.device.type != "cpu" if self.fixed_size is None else self.fixed_size:
            return FrontEndBatch(view1, view2, None, mask, capacity(clips, patches, **self.masks))
        return FrontEndBatch(view1, view2, torch.full((clips,), frames), mask)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        """The generator of all draws, which are made where the mel is."""
        if device.type == "cpu":
            return self.generator
        if self.device_generator is None or self.device_generator.device != device:
            self.device_generator = torch.Generator(device).manual_seed(self.generator.initial_seed())
        return self.device_generator

    def get_extra_state(self) -> dict[str, Any]:
        """Generators and memory banks."""
        banks = [None if bank is None else bank.state_dict() for bank in self.banks]
        device = next(self.buffers()).device
        on_device = None if device.type == "cpu" else self._generator_on(device).get_state()
        return {"generator": self.generator.get_state(), "device_generator": on_device, "banks": banks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        device = next(self.buffers()).device
        on_device = state.get("device_generator")
        if (on_device is None) != (device.type == "cpu"):
            saved = "cpu" if on_device is None else "a GPU"
            raise ValueError(
                f"FrontEnd: the state was saved on {saved} and this front end is on {device}: the random states of "
                "different devices are not interchangeable; go on where it was saved, or start anew"
            )
        self.generator.set_state(state["generator"].cpu())
        if on_device is not None:
            self._generator_on(device).set_state(on_device.cpu())
        for bank, saved in zip(self.banks, state["banks"], strict=True):
            if (bank is None) != (saved is None):
                raise ValueError("FrontEnd: the state is of a front end that augments other views")
            if bank is not None:
                bank.load_state_dict(saved)
