"""Measuring: a case's inputs, its parity with the definition, then its time."""

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atst_fast.bench import parity, timing
from atst_fast.bench.operator import OURS, Case, Missing
from atst_fast.ops import build_info


@dataclass(frozen=True)
class Measured:
    """One line of a result, as report.py reads it."""

    group: str
    name: str
    params: dict[str, Any]
    extra_info: dict[str, Any]
    stats: timing.Stats


@dataclass(frozen=True)
class LeftOut:
    """A case without a time, and why. ``fault``: it should have had one."""

    group: str
    name: str
    params: dict[str, Any]
    why: str
    fault: bool


class Ready(NamedTuple):
    call: Callable[[], Any]
    extra_info: dict[str, Any]


class Session:
    """Measures cases of one device, ``seconds`` each (some more for what is prepared and checked).

    Cases of one comparison should follow one another: the definition is then computed once for all of them.
    """

    def __init__(self, seconds: float = 0.5, stopwatch: Any = None) -> None:
        self.seconds, self._stopwatch = seconds, stopwatch
        self._truth: tuple[tuple, list[Tensor]] | None = None
        self._runs = build_info()["operators"]

    def stopwatch(self, device: str) -> Any:
        if self._stopwatch is None:
            self._stopwatch = timing.Cuda() if device == "cuda" else timing.Cpu()
        return self._stopwatch

    def check(self, case: Case) -> None:
        """Run the case once. Raises Missing, ParityError, or what its provider raises."""
        with self.ready(case):
            pass

    def measure(self, case: Case) -> Measured:
        """The same, then time it."""
        with self.ready(case) as (call, extra):
            way = "repeated" if case.device == "cpu" else "replayed" if case.kind == "in a graph" else "launched"
            stats = getattr(timing, way)(call, self.stopwatch(case.device), self.seconds)
            return Measured(case.group, case.name, case.params, extra, stats)

    @contextlib.contextmanager
    def ready(self, case: Case) -> Iterator[Ready]:
        """The call of a case whose results are right, on as many threads as it wants, and what is known of it."""
        operator, provider = case.operator, case.operator.providers[case.provider]
        with timing.on_threads(case.threads), whole_graphs():
            inputs = case.make()
            extra = dict(operator.work(inputs))
            # of the inputs as they are before the first call, which may change them
            truth = None if provider.part else self._definition(case, inputs)
            call = provider.make(inputs)
            returned = call()
            if truth is None:
                extra["note"] = provider.part
            else:
                dtype = parity.dtype_of_products(extra.get("dtype", "float32"), case.device)
                found = parity.check(operator.results(inputs, returned), truth, dtype, operator.allowed)
                extra["parity"] = found._asdict()
            if case.provider.startswith(OURS):
                extra["runs"] = self._runs[operator.runs or operator.name][case.device]
            del returned
            yield Ready(call, extra)
        if case.device == "cuda":
            torch.cuda.synchronize()

    def _definition(self, case: Case, inputs: Any) -> list[Tensor]:
        if self._truth is None or self._truth[0] != case.comparison:
            self._truth = None  # what it holds goes before there is another
            self._truth = case.comparison, [t.detach() for t in case.operator.truth(inputs)]
        return self._truth[1]


def run(cases: Iterable[Case], session: Session, tell: Callable = lambda *_: None) -> Iterator[Measured | LeftOut]:
    """Measure one case after the other; what cannot be measured costs no other. ``tell(case)`` comes before each."""
    for case in cases:
        tell(case)
        try:
            yield session.measure(case)
        except Missing as error:
            yield left_out(case, str(error), fault=False)
        except parity.ParityError as error:
            yield left_out(case, str(error), fault=True)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            # a peer that this device or this build of torch does not have says so when it is called
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            yield left_out(case, why, fault=case.provider.startswith(OURS))
        finally:
            gc.collect()
            if case.device == "cuda":
                torch.cuda.empty_cache()


def left_out(case: Case, why: str, fault: bool) -> LeftOut:
    return LeftOut(case.group, case.name, case.params, why, fault)


@contextlib.contextmanager
def whole_graphs() -> Iterator[None]:
    """What is compiled gives its graph away otherwise, and could go back once only."""
    config = importlib.import_module("torch._functorch.config")  # not imported by torch itself
    with config.patch(donated_buffer=False):
        yield
