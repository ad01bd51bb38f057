"""What the front ends of both methods share: log-mel, memory banks, random numbers, and the state of all that."""

from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.nn import LogMelSpectrogram
from atst_fast.ops.augment import MemoryBank, augment_views, draw_augment


class Views(nn.Module):
    """Makes two views of a batch of clips, on the device of the waveform, which is that of its buffers.

    It draws there too: from ``generator`` on a CPU, on a GPU from ``device_generator``, which has the same seed. The
    state dict holds generators and banks, so a run that is continued sees the same views. Random states of a CPU and a
    GPU are not interchangeable: one that was saved on the other is refused. On a GPU nothing waits for it, and a CUDA
    graph can hold a call (once the banks exist, so not the first one), with ``device_generator`` registered.

    Args: ``augmented``: which of the views are; ``mixup``: whether those are mixed with earlier clips, each with a
    memory bank of ``bank_size`` clips of its own; ``crops``: how they are cropped, arguments of ``draw_augment``;
    ``mel``: arguments of ``nn.LogMelSpectrogram``.
    """

    def __init__(
        self,
        *,
        augmented: tuple[bool, bool],
        mixup: bool,
        bank_size: int,
        crops: dict[str, Any],
        seed: int,
        **mel: Any,
    ):
        super().__init__()
        self.log_mel = LogMelSpectrogram(**mel)
        self.augmented, self.crops = augmented, crops
        self.banks = [MemoryBank(bank_size) if on and mixup else None for on in augmented]
        self.generator = torch.Generator().manual_seed(seed)
        self.device_generator: torch.Generator | None = None

    def view(self, number: int, mel: Tensor) -> Tensor:
        """View 0 or 1 of ``mel`` ``[B, 1, F, T]``, of that size: itself, or mixed and cropped."""
        if not self.augmented[number]:
            return mel
        bank = self.banks[number]
        if bank is not None:
            bank.to(mel.device)
        draws = draw_augment(mel.shape, bank, self.generator_on(mel.device), **self.crops)
        return augment_views(mel, [draws], [bank])[0]

    def generator_on(self, device: torch.device) -> torch.Generator:
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
        on_device = None if device.type == "cpu" else self.generator_on(device).get_state()
        return {"generator": self.generator.get_state(), "device_generator": on_device, "banks": banks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        device, name = next(self.buffers()).device, type(self).__name__
        on_device = state.get("device_generator")
        if (on_device is None) != (device.type == "cpu"):
            saved = "cpu" if on_device is None else "a GPU"
            raise ValueError(
                f"{name}: the state was saved on {saved} and this front end is on {device}: the random states of "
                "different devices are not interchangeable; go on where it was saved, or start anew"
            )
        self.generator.set_state(state["generator"].cpu())
        if on_device is not None:
            self.generator_on(device).set_state(on_device.cpu())
        for bank, saved in zip(self.banks, state["banks"], strict=True):
            if (bank is None) != (saved is None):
                raise ValueError(f"{name}: the state is of a front end that augments other views")
            if bank is not None:
                bank.load_state_dict(saved)
