"""What a benchmark is made of: an operator with its sizes, inputs, providers, its definition, and what it must do."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OURS = "atst_fast"
CPU, CUDA = ("cpu",), ("cuda",)


class Missing(Exception):
    """A peer that this machine lacks: what and how to get it."""


def installed(module: str, cure: str) -> ModuleType:
    """A peer's module; Missing if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module.partition('.')[0]} is not installed ({cure})") from error


Curves = Mapping[str, tuple[str, Mapping[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class Provider:
    """Somebody who computes an operator: ``make(inputs)`` gives the call to be timed, without arguments.

    The call returns the operator's results, or the tensors that it has changed. ``where`` are the values of options
    that it has, if it lacks some. ``part`` says, of what is no peer but a
    bound for all of them, which part of the work it does; it has no parity.
    """

    make: Callable[[Any], Callable[[], Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    part: str = ""
    where: Mapping[str, tuple] = field(default_factory=dict)

    def has(self, options: Mapping[str, Any]) -> bool:
        return all(options.get(name) in values for name, values in self.where.items())


@dataclass(frozen=True)
class Operator:
    """One public function of ``atst_fast.ops`` (or ``optim``) beside what one would call otherwise.

    ``sizes[device][name]`` are the numbers by which inputs grow (batch, frames, tokens, ...), ``options[device]`` the
    values of what else is varied; ``make(device, **axes, **options)`` makes everything that is not timed, by torch's
    seed. ``truth(inputs)`` gives the results by the definition (atst_fast.reference) in float64, and leaves the inputs
    as they are; ``results(inputs, returned)`` takes from what a call returned that which is compared with them.
    ``work(inputs)`` says what a call must do at least: ``bytes`` that it reads and writes, each once, ``flops``, and
    ``dtype`` where they are those of tensor cores; ``items`` is what a second rate counts, as (number, unit).
    ``curves[device]`` is the size that curves start from, and the values of each axis. ``replayed`` are sizes that are
    also timed in a CUDA graph, forward, with these providers. ``allowed`` replaces the largest errors of parity.py.
    """

    name: str
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]]
    make: Callable[..., Any]
    providers: Mapping[str, Provider]
    truth: Callable[[Any], Sequence[Tensor]]
    work: Callable[[Any], dict[str, Any]]
    options: Mapping[str, Mapping[str, tuple]] = field(default_factory=dict)
    results: Callable[[Any, Any], Any] = lambda inputs, returned: returned
    curves: Curves = field(default_factory=dict)
    replayed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    allowed: Mapping[str, float] = field(default_factory=dict)
    runs: str = ""  # its name in build_info(), where that is another one

    def cases(self, device: str) -> Iterator["Case"]:
        """Every size with every option, providers of one comparison next to one another."""
        for size in self.sizes[device]:
            for options in _products(self.options.get(device, {})):
                yield from self._providers(device, size, {}, options)
        if device == "cuda":
            for size, providers in self.replayed.items():
                for options in _products(_first(self.options.get(device, {}), keep=("masked", "form"))):
                    yield from self._providers(device, size, {}, options, "in a graph", providers)

    def curve_cases(self, device: str, over: Sequence[str] | None = None) -> Iterator["Case"]:
        """One axis varied at a time, both ways, the first value of every other option; ``over``: these axes alone."""
        axes = self.axes(device)
        for axis in [a for a in axes if over is None or a in over]:
            options = {k: v for k, v in self.options.get(device, {}).items() if k != axis}
            for chosen in _products(_first(options, keep=("way",))):
                for value in axes[axis]:
                    yield from self._providers(device, self.curves[device][0], {axis: value}, chosen, f"over {axis}")

    def axes(self, device: str) -> Mapping[str, tuple[int, ...]]:
        """What its curves are over, with the values of each."""
        if device not in self.curves:
            return {}
        return {**self.curves[device][1], **({"threads": thread_counts()} if device == "cpu" else {})}

    def _providers(self, device, size, varied, options, kind="", only=None) -> Iterator["Case"]:
        for name, provider in self.providers.items():
            if device in provider.devices and provider.has(options) and (only is None or name in only):
                yield Case(self, device, size, varied, options, name, kind)


@dataclass(frozen=True)
class Case:
    """One line of a result: an operator at a size, with options, by one provider."""

    operator: Operator
    device: str
    size: str
    varied: Mapping[str, int]
    options: Mapping[str, Any]
    provider: str
    kind: str = ""  # "in a graph", "over frames"

    @property
    def group(self) -> str:
        return f"{self.operator.name} {self.kind}" if self.kind.startswith("over") else self.operator.name

    @property
    def params(self) -> dict[str, Any]:
        return {"size": self.size, **self.options, **self.varied, "provider": self.provider}

    @property
    def name(self) -> str:
        function = "_".join(f"test {self.operator.name} {self.kind}".split())
        return f"{function}[{self.id}]"

    @property
    def id(self) -> str:
        return "-".join(map(str, (*([self.device] if self.device != "cpu" else []), *self.params.values())))

    @property
    def comparison(self) -> tuple:
        """What the cases have in common whose results are the same."""
        return self.operator.name, self.device, self.kind, self.size, *self.varied.items(), *self.options.items()

    @property
    def threads(self) -> int:
        """How many threads it runs on: its own number, or torch's."""
        return self.varied.get("threads") or self.options.get("threads") or torch.get_num_threads()

    def make(self) -> Any:
        """The inputs, the same for every provider."""
        torch.manual_seed(0)
        axes = {**self.operator.sizes[self.device][self.size], **self.varied}
        both = {k: v for k, v in {**axes, **self.options}.items() if k != "threads"}
        return self.operator.make(self.device, **both)


def thread_counts() -> tuple[int, ...]:
    """1, 2, 4, ... up to the threads that torch has now."""
    most, counts = torch.get_num_threads(), [1]
    while 2 * counts[-1] <= min(most, os.cpu_count() or 1):
        counts.append(2 * counts[-1])
    return (*counts, most) if most > counts[-1] else tuple(counts)


def _first(options: Mapping[str, tuple], keep: tuple[str, ...]) -> dict[str, tuple]:
    return {name: values if name in keep else values[:1] for name, values in options.items()}


def _products(options: Mapping[str, tuple]) -> Iterator[dict[str, Any]]:
    chosen: list[dict[str, Any]] = [{}]
    for name, values in options.items():
        chosen = [{**c, name: value} for c in chosen for value in values]
    yield from chosen
