"""Functions of tensors, timed forward alone or backward alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WAYS = ("forward", "backward")


class Differentiable:
    """Arguments of a function, and which way it is timed: "forward" keeps nothing, "backward" has the gradients of
    those arguments that need one, from given gradients of the results, by a forward pass that was made before."""

    def __init__(self, way: str, arguments: Sequence[Any], outputs: int | None = None) -> None:
        self.way, self.arguments, self.outputs = way, list(arguments), outputs

    def call(self, function: Callable) -> Callable[[], Any]:
        """What is timed, of any function of the arguments."""
        if self.way == "forward":
            return lambda: torch.no_grad()(function)(*self.arguments)
        results, leaves = self._differentiable(function(*self.arguments)), self.leaves()
        gradients = random_like(results)
        return lambda: torch.autograd.grad(results, leaves, gradients, retain_graph=True)

    def leaves(self) -> list[Tensor]:
        return [x for x in self.arguments if isinstance(x, Tensor) and x.requires_grad]

    def truth(self, function: Callable) -> list[Tensor]:
        """The same in float64."""
        wide = Differentiable(self.way, [widened(x) for x in self.arguments], self.outputs)
        returned = wide.call(function)()
        return list(returned) if isinstance(returned, (tuple, list)) else [returned]

    def _differentiable(self, returned: Any) -> list[Tensor]:
        results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        return results[: self.outputs]


def random_like(results: list[Tensor]) -> list[Tensor]:
    """Of few enough bits that every dtype has them: the same for every provider and for the definition."""
    generator = torch.Generator(results[0].device).manual_seed(1)
    numbers = (torch.randn(r.shape, device=r.device, generator=generator) for r in results)
    return [x.bfloat16().to(r.dtype) for x, r in zip(numbers, results)]


def widened(x: Any) -> Any:
    """Tensors of floating-point numbers in float64, as leaves of their own."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)
