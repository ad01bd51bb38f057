"""Whether a layer may be read instead of called."""

from torch import nn


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether ``layer`` is of that kind and no more: no subclass (LoRA, parametrisation, quantisation), no hook, no
    forward of its own.

    Only then does the module that holds it put its weight and bias into a fused operator.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and "forward" not in vars(layer)
