"""What the front ends have in common: a window and a filterbank that are buffers, and stay float32."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """A module with two buffers that ``make`` makes, on the CPU; ``names`` may lie in submodules: "mel_scale.fb".

    They stay float32 under ``.half()`` and ``.bfloat16()``: 80 dB do not fit into less. A module that was made on the
    meta device has its tables again as soon as it leaves it.
    """

    def __init__(self, names: tuple[str, str], make: Callable[..., tuple[Tensor, Tensor]], *settings, persistent=True):
        super().__init__()
        self._names, self._make, self._settings = names, make, settings
        device = torch.get_default_device()
        for name, table in zip(names, make(*settings)):
            folder, _, last = name.rpartition(".")
            if folder:
                self.add_module(folder, nn.Module())
            self.get_submodule(folder).register_buffer(last, table.to(device), persistent=persistent)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The tables of the arguments, in place of what the buffers hold."""
        for name, table in zip(self._names, self._make(*self._settings)):
            self.get_buffer(name).copy_(table)

    @property
    def _window(self) -> Tensor:
        return self.get_buffer(self._names[0])

    @property
    def _fb(self) -> Tensor:
        return self.get_buffer(self._names[1])

    def _apply(self, fn, recurse=True):
        tables = self._window, self._fb
        super()._apply(fn, recurse)
        device = self._window.device
        if tables[0].is_meta and not self._window.is_meta:
            tables = self._make(*self._settings)  # what comes from there has no values
        elif self._window.dtype == torch.float32:
            return self
        for name, table in zip(self._names, tables):
            folder, _, last = name.rpartition(".")
            setattr(self.get_submodule(folder), last, table.to(device))
        return self
