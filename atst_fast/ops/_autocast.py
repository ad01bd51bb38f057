"""What the operators do about autocast: nothing of their own is cast by it, they say themselves what they round."""

from contextlib import AbstractContextManager, nullcontext

import torch


def off(device: torch.device) -> AbstractContextManager:
    """No autocast inside, for matrix products of torch that an operator has chosen the dtype of."""
    return torch.autocast(device.type, enabled=False) if _exists(device) else nullcontext()


def is_on(device: torch.device) -> bool:
    """Whether torch would cast the inputs of a matrix product on that device."""
    return _exists(device) and torch.is_autocast_enabled(device.type)


def _exists(device: torch.device) -> bool:
    # the meta device has none, and says so by raising
    return device.type != "meta"
