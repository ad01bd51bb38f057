"""Whether a linear layer may be read instead of called."""

from torch import nn


def is_plain(layer: nn.Module) -> bool:
    """Whether ``layer`` is an ``nn.Linear`` and no more: no subclass (LoRA, parametrisation, quantisation), no hook.

    Only then does the module that holds it put its weight and bias into a fused operator.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and not any(hooks)
